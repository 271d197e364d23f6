"""Damaged and hostile headers: refused by name, at once and within bounds, however they are damaged."""

from __future__ import annotations

import json
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openelm.convert.convert import Options, open_source, write
from openelm.convert.gguf import open_gguf
from openelm.convert.gguf_file import read_gguf
from openelm.errors import CheckpointError, OpenELMError
from openelm.model.config import ModelConfig
from openelm.model.weights import open_safetensors

from .conftest import Publish

SLOWEST_SECONDS, GROWTH_BYTES = 1.0, 200 << 20


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Damage a few places: flipped bits, numbers at their limits, pieces repeated, removed or swapped."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(max(1, len(changed)))
        match generator.randrange(6):
            case 0:
                changed[place : place + 1] = bytes([generator.randrange(256)])
            case 1:
                extreme = generator.choice([0, 1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, (1 << 64) - 1])
                changed[place : place + 8] = struct.pack("<Q", extreme)
            case 2:
                changed[place : place + 4] = struct.pack("<I", generator.choice([0, 5, 8, 9, 12, 13, (1 << 32) - 1]))
            case 3:
                del changed[place : place + generator.randint(1, 16)]
            case 4:
                piece = changed[place : place + generator.randint(1, 32)]
                changed[place:place] = piece * generator.choice([1, 1, 100])
            case _:
                changed[place : place + 1] = generator.choice(
                    [b'"', b"[", b"]", b"{", b"}", b",", b":", b"-", b"9", b"\xff"]
                )
    return bytes(changed)


def survive(read: Callable[[Path], object], header: bytes, rest: int, path: Path, count: int, seed: int) -> None:
    """Read mutants: each is accepted or refused with an error that names the file, in time and in little memory.

    Args:
        rest: bytes after the header, of numbers that are not read.
    """
    generator = random.Random(seed)
    before, wrong = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, []
    for number in range(count):
        with path.open("wb") as file:
            file.truncate(file.write(mutated(header, generator)) + rest)
        began = time.perf_counter()
        try:
            read(path)
        except OpenELMError as error:
            if error.file != path:
                wrong.append((number, f"names {error.file}: {error}"))
        except Exception as error:
            wrong.append((number, repr(error)))
        if time.perf_counter() - began > SLOWEST_SECONDS:
            wrong.append((number, "too slow"))
    assert wrong[:3] == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < GROWTH_BYTES


counts = pytest.mark.parametrize(
    "share", [pytest.param(100, marks=pytest.mark.quick), pytest.param(1)], ids=["a hundredth", "all"]
)


@pytest.mark.faults
@counts
def test_safetensors_headers(publish: Publish, tmp_path: Path, share: int) -> None:
    data = (publish() / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    survive(open_safetensors, data[: 8 + size], len(data) - 8 - size, tmp_path / "m.safetensors", 60_000 // share, 1)


@pytest.mark.faults
@counts
def test_configs(publish: Publish, tmp_path: Path, share: int) -> None:
    data = (publish() / "config.json").read_bytes()
    survive(ModelConfig.from_file, data, 0, tmp_path / "config.json", 10_000 // share, 2)


@pytest.mark.faults
@counts
def test_gguf_headers(publish: Publish, tmp_path: Path, share: int) -> None:
    with open_source(publish()) as source:
        write(source, tmp_path / "out", Options(to="gguf"))
    data = (tmp_path / "out" / "model.gguf").read_bytes()
    end = min(data.index(b"output_norm.weight") + 64, len(data))
    survive(open_gguf, data[:end], len(data) - end, tmp_path / "m.gguf", 10_000 // share, 3)


def field(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IQ", 4, 1 << 60),  # 2^60 numbers in a file of 100 bytes
        struct.pack("<IQ", 8, 1 << 60),
        struct.pack("<IQ", 9, 1 << 60),
        struct.pack("<IQ", 0, (1 << 64) - 1),
    ],
    ids=["numbers", "texts", "lists", "bytes"],
)
def test_an_array_without_end_costs_nothing(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field("a", 9, value))
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read_gguf(path)
    assert time.perf_counter() - began < SLOWEST_SECONDS
    assert caught.value.offset is not None and caught.value.file == path


def test_a_model_of_another_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    text = struct.pack("<Q", 5) + b"llama"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field("general.architecture", 8, text))
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'llama'"):
        open_gguf(path)


def test_blocks_that_cannot_be_unpacked_are_named_before_anything_is_read(tmp_path: Path) -> None:
    path, q8_1 = tmp_path / "m.gguf", 9
    tensor = struct.pack("<Q", 1) + b"x" + struct.pack("<IQIQ", 1, 32, q8_1, 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor + bytes(200))
    with pytest.raises(CheckpointError, match="x is Q8_1, which the gguf package cannot unpack") as caught:
        read_gguf(path)
    assert caught.value.file == path and "llama-quantize" in str(caught.value.fix)


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "sub/m.safetensors", "m.bin", "..safetensors", 5])
def test_an_index_names_files_of_its_folder_only(publish: Publish, name: object) -> None:
    folder = publish()
    (folder / "manifest.json").unlink()
    index = {"weight_map": {"transformer.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not an index of weights"), open_source(folder):
        pass


def test_a_link_out_of_a_folder_is_refused_and_one_of_the_hugging_face_cache_followed(
    publish: Publish, tmp_path: Path
) -> None:
    folder, cache = publish(), tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1234").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(cache / "blobs" / name)
        (cache / "snapshots" / "1234" / name).symlink_to(f"../../blobs/{name}")
    with open_source(cache / "snapshots" / "1234") as source:
        assert source.weights["transformer.norm.weight"].read().dtype == torch.float32
    (tmp_path / "other").mkdir()
    (cache / "snapshots" / "1234" / "config.json").rename(tmp_path / "other" / "config.json")
    (tmp_path / "other" / "model.safetensors").symlink_to(cache / "blobs" / "model.safetensors")
    (tmp_path / "other" / "config.json").unlink()
    (cache / "blobs" / "config.json").rename(tmp_path / "other" / "config.json")
    with pytest.raises(CheckpointError, match="no plain file"), open_source(tmp_path / "other"):
        pass
