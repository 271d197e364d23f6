"""A folder's manifest: damage anywhere is named by file and by place, and a manifest cannot lie or reach out."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from openelm.errors import CheckpointError
from openelm.files.hashes import sha256_bytes, sha256_file
from openelm.files.published import MANIFEST, manifest_bytes, piece_bytes, publish_folder, verify_folder

from .test_files import ABC_SHA256, publish


def test_a_published_folder_has_a_manifest_of_all_its_files(tmp_path: Path) -> None:
    publish(tmp_path / "deep" / "target", "one")
    found = json.loads((tmp_path / "deep" / "target" / MANIFEST).read_bytes())
    assert found["files"] == {
        "a.txt": {"bytes": 3, "sha256": sha256_bytes(b"one"), "crc32": f"{zlib.crc32(b'one'):08x}"},
        "b.bin": {
            "bytes": 256,
            "sha256": sha256_bytes(bytes(range(256))),
            "crc32": "29058c73",  # of the bytes 0 to 255, as other tools give it
        },
    }
    assert found.keys() == {"crc32", "files"}
    assert os.listdir(tmp_path / "deep") == ["target"]


def test_verify_returns_the_manifests_hash(tmp_path: Path) -> None:
    publish(tmp_path / "t", "one")
    assert verify_folder(tmp_path / "t") == sha256_file(tmp_path / "t" / MANIFEST)


def test_equal_content_has_an_equal_hash(tmp_path: Path) -> None:
    for name in ("t", "u"):
        publish(tmp_path / name, "one")
    assert verify_folder(tmp_path / "t") == verify_folder(tmp_path / "u")


@pytest.mark.faults
@pytest.mark.quick
def test_a_thousand_flipped_bits_are_named_by_file_and_by_the_piece_they_lie_in(tmp_path: Path) -> None:
    folder, generator = tmp_path / "t", random.Random(0)
    sizes = {"none": 0, "one": 1, "piece": 4096, "more": 4097, "many": 50_000, "longer": 4097 * 1024}
    with publish_folder(folder) as temporary:
        for name, size in sizes.items():
            (temporary / name).write_bytes(generator.randbytes(size))
    places = [folder / name for name, size in sizes.items() if size] + [folder / MANIFEST]
    for _ in range(1000):
        file = generator.choice(places)
        size = file.stat().st_size
        bit = generator.randrange(8 * size)
        flip(file, bit)
        with pytest.raises(CheckpointError) as caught:
            verify_folder(folder)
        flip(file, bit)
        assert caught.value.file == file
        if file.name != MANIFEST:
            first, last = named_range(caught.value)
            assert first <= bit // 8 <= last < size and caught.value.offset == first
            assert last - first < piece_bytes(size)
    verify_folder(folder)


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        (byte,) = opened.read(1)
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def named_range(error: CheckpointError) -> tuple[int, int]:
    found = re.search(r"bytes (\d+) to (\d+) of", str(error))
    assert found, str(error)
    return int(found[1]), int(found[2])


def test_pieces_are_powers_of_two_and_at_most_1024() -> None:
    assert [piece_bytes(size) for size in (0, 1, 4 << 20, (4 << 20) + 1, 1 << 30)] == [4096, 4096, 4096, 8192, 1 << 20]
    generator = random.Random(0)
    for _ in range(1000):
        size = generator.randrange(1 << generator.randrange(1, 45))
        piece = piece_bytes(size)
        assert piece & (piece - 1) == 0 and -(-size // piece) <= 1024
        assert piece == 4096 or size > 1024 * piece // 2  # never longer than they must be


def test_the_first_of_several_damaged_pieces_is_named(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "t") as folder:
        (folder / "a").write_bytes(bytes(50_000))
    for byte in (45_000, 9_000, 20_000):
        flip(tmp_path / "t" / "a", 8 * byte)
    with pytest.raises(CheckpointError, match="bytes 8192 to 12287 of 50000"):
        verify_folder(tmp_path / "t")


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 49_999, 50_001])
def test_a_file_that_ends_elsewhere_is_named_with_the_place(tmp_path: Path, size: int) -> None:
    with publish_folder(tmp_path / "t") as folder:
        (folder / "a").write_bytes(bytes(50_000))
    os.truncate(tmp_path / "t" / "a", size)
    with pytest.raises(CheckpointError, match=f"{size} bytes, but the manifest says 50000") as caught:
        verify_folder(tmp_path / "t")
    assert (caught.value.file, caught.value.offset) == (tmp_path / "t" / "a", min(size, 50_000))


def test_a_file_exchanged_together_with_its_pieces_checksums_is_damage_all_the_same(tmp_path: Path) -> None:
    publish(tmp_path / "t", "one")
    (tmp_path / "t" / "a.txt").write_text("two")
    files = json.loads((tmp_path / "t" / MANIFEST).read_bytes())["files"]
    files["a.txt"]["crc32"] = f"{zlib.crc32(b'two'):08x}"
    (tmp_path / "t" / MANIFEST).write_bytes(manifest_bytes(files))
    with pytest.raises(CheckpointError, match=r"a\.txt.*damaged: another SHA-256"):
        verify_folder(tmp_path / "t")


@pytest.mark.parametrize("checksums", ["", "0", "zz" * 40, "0" * 800])
def test_pieces_checksums_that_are_none_decide_nothing(tmp_path: Path, checksums: str) -> None:
    publish(tmp_path / "t", "one")
    files = json.loads((tmp_path / "t" / MANIFEST).read_bytes())["files"]
    files["a.txt"]["crc32"] = checksums
    (tmp_path / "t" / MANIFEST).write_bytes(manifest_bytes(files))
    verify_folder(tmp_path / "t")
    (tmp_path / "t" / "a.txt").write_text("two")
    with pytest.raises(CheckpointError, match=r"a\.txt"):
        verify_folder(tmp_path / "t")


def test_a_flipped_bit_in_a_name_cannot_hide_a_file_behind_another(tmp_path: Path) -> None:
    with publish_folder(tmp_path / "t") as folder:
        for name in ("a", "c"):  # one bit apart
            (folder / name).write_text("same")
    manifest = tmp_path / "t" / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"a"', b'"c"'))
    with pytest.raises(CheckpointError):
        verify_folder(tmp_path / "t")


def broken_text(folder: Path) -> None:
    (folder / "a.txt").write_text("onE")


def shorter(folder: Path) -> None:
    (folder / "a.txt").write_text("on")


def gone(folder: Path) -> None:
    (folder / "a.txt").unlink()


def link(folder: Path) -> None:
    (folder / "a.txt").rename(folder.parent / "outside")
    (folder / "a.txt").symlink_to(folder.parent / "outside")


def is_folder(folder: Path) -> None:
    gone(folder)
    (folder / "a.txt").mkdir()


@pytest.mark.parametrize("harm", [broken_text, shorter, gone, link, is_folder])
def test_harm_is_named_by_its_file(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    publish(tmp_path / "t", "one")
    harm(tmp_path / "t")
    with pytest.raises(CheckpointError) as caught:
        verify_folder(tmp_path / "t")
    assert caught.value.file == tmp_path / "t" / "a.txt"


@pytest.mark.parametrize("name", ["../secret", "sub/secret", "/etc/hostname", "..", ".", "", "a\0b", "\ud800"])
def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path: Path, name: str) -> None:
    for place in (tmp_path / "secret", tmp_path / "t" / "sub" / "secret"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"abc")
    entry = {name: {"bytes": 3, "sha256": ABC_SHA256, "crc32": "352441c2"}}
    (tmp_path / "t" / MANIFEST).write_bytes(manifest_bytes(entry))
    with pytest.raises(CheckpointError) as caught:
        verify_folder(tmp_path / "t")
    assert str(caught.value).isprintable()


FILES_THAT_ARE_NONE = ("[]", '{"a": 3}', '{"a": {"bytes": 3}}', '{"a": {"bytes": null, "sha256": "", "crc32": ""}}')
TEXTS_THAT_ARE_NONE = ("", "[]", "{}", "null", '{"files": {}}', '{"files": {"a": {"bytes": 1e999, "sha256": ""}}}')


@pytest.mark.parametrize("files", FILES_THAT_ARE_NONE)
def test_a_manifest_of_no_files_facts_is_refused(tmp_path: Path, files: str) -> None:
    (tmp_path / MANIFEST).write_bytes(manifest_bytes(json.loads(files)))
    refused(tmp_path)


@pytest.mark.parametrize(
    "text", [*TEXTS_THAT_ARE_NONE, "[" * 100_000, '{"files":' * 100_000, "\xff"], ids=lambda text: text[:40]
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    refused(tmp_path)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    refused(tmp_path)


def refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="missing or damaged") as caught:
        verify_folder(folder)
    assert caught.value.file == folder / MANIFEST


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    """Two large tensors and small ones between them, each filled with its own number."""
    sizes = {"a": 5000, "b": 10, "c": 10, "d": 5000}
    values = {name: np.full(size, ord(name), np.float32) for name, size in sizes.items()}
    with publish_folder(tmp_path / "t") as folder:
        save_file(values, folder / "w.safetensors")
    return tmp_path / "t" / "w.safetensors"


@pytest.mark.parametrize(
    ("name", "place", "said"), [("a", 3000, "tensor a$"), ("b", 5, "tensors a to d$"), ("d", 4000, "tensor d$")]
)
def test_the_tensors_of_a_damaged_piece_are_named(tensors: Path, name: str, place: int, said: str) -> None:
    values = np.float32(ord(name)).tobytes()
    flip(tensors, 8 * (tensors.read_bytes().index(3 * values) + 4 * place))
    with pytest.raises(CheckpointError, match=said) as caught:
        verify_folder(tensors.parent)
    assert caught.value.file == tensors


def test_no_tensor_is_named_when_the_header_is_not_whole(tensors: Path) -> None:
    for byte in (3, 12):
        flip(tensors, 8 * byte)
        with pytest.raises(CheckpointError, match=r"bytes 0 to 4095 of [0-9]+$"):
            verify_folder(tensors.parent)


@pytest.mark.parametrize("header", ["[", "[]", '{"a": 3}', '{"a": {"data_offsets": [0, "x"]}}', "{}", "[" * 5000])
def test_a_header_that_is_none_is_no_reason_to_crash(tmp_path: Path, header: str) -> None:
    with publish_folder(tmp_path / "t") as folder:
        header = header.ljust(5000)
        (folder / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(10_000))
    flip(tmp_path / "t" / "w.safetensors", 8 * 14_000)
    with pytest.raises(CheckpointError, match=r"bytes 12288 to 15007 of 15008$"):
        verify_folder(tmp_path / "t")
