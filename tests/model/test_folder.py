"""A model folder comes back bit for bit, and a damaged or foreign one is refused by name before it costs anything."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openelm.errors import CheckpointError, DiskError
from openelm.files.published import MANIFEST, manifest_bytes, verify_folder
from openelm.model.folder import is_chat_tuned, load_model, read_tensors, save_model, weights_sha256
from openelm.model.transformer import OpenELM
from openelm.model.weights import WEIGHTS, open_safetensors
from openelm.text.tokenizer import ByteTokenizer, load_tokenizer

MakeModel = Callable[..., OpenELM]
QKV = "transformer.layers.1.attn.qkv_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, make_model: MakeModel) -> Path:
    """A folder published by us."""
    save_model(tmp_path / "model", make_model(), card="# A card\n")
    return tmp_path / "model"


@pytest.fixture
def foreign(folder: Path) -> Path:
    """The same folder as from elsewhere: without our manifest."""
    (folder / MANIFEST).unlink()
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / WEIGHTS)


def refusal(folder: Path, file: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert caught.value.file == folder / file
    assert str(caught.value).isprintable()
    return caught.value.what


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_saved_model_comes_back_bit_for_bit(
    tmp_path: Path, make_model: MakeModel, tokens: Tensor, dtype: torch.dtype
) -> None:
    model = make_model(dtype)
    save_model(tmp_path / "m", model)
    back = load_model(tmp_path / "m")
    assert back.config == model.config
    assert weights_sha256(back.state_dict()) == weights_sha256(model.state_dict())
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        assert torch.equal(back(tokens), model(tokens))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_loaded_model_can_be_trained(folder: Path, tokens: Tensor) -> None:
    model = load_model(folder)
    model(tokens).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_loading_converts_when_asked(folder: Path, make_model: MakeModel) -> None:
    back = load_model(folder, dtype=torch.bfloat16)
    assert weights_sha256(back.state_dict()) == weights_sha256(make_model(torch.bfloat16).state_dict())


def test_training_a_loaded_model_leaves_its_folder_alone(folder: Path) -> None:
    model, before = load_model(folder), verify_folder(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert verify_folder(folder) == before


def test_a_loaded_model_outlives_its_folder(folder: Path, make_model: MakeModel) -> None:
    model = load_model(folder)
    save_model(folder, make_model(seed=1), replace=True)
    shutil.rmtree(folder)
    assert weights_sha256(model.state_dict()) == weights_sha256(make_model().state_dict())


def test_a_folder_has_the_published_files_and_nothing_else(folder: Path) -> None:
    assert set(os.listdir(folder)) == {"README.md", "config.json", "generation_config.json", MANIFEST, WEIGHTS}
    assert os.listdir(folder.parent) == ["model"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("openelm", ["OpenELMForCausalLM"])
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    verify_folder(folder)


def test_the_same_model_is_the_same_folder(tmp_path: Path, make_model: MakeModel) -> None:
    for name in ("a", "b"):
        save_model(tmp_path / name, make_model())
    assert verify_folder(tmp_path / "a") == verify_folder(tmp_path / "b")


def test_the_tokenizer_travels_with_the_model(tmp_path: Path, make_model: MakeModel) -> None:
    save_model(tmp_path / "m", make_model(), tokenizer=ByteTokenizer())
    assert load_tokenizer(tmp_path / "m").sha256 == ByteTokenizer().sha256
    load_model(tmp_path / "m")


def test_an_existing_folder_is_kept_unless_replaced(folder: Path, make_model: MakeModel) -> None:
    other = make_model(seed=1)
    with pytest.raises(CheckpointError, match="exists already"):
        save_model(folder, other)
    assert weights_sha256(tensors_of(folder)) == weights_sha256(make_model().state_dict())
    save_model(folder, other, replace=True)
    assert weights_sha256(tensors_of(folder)) == weights_sha256(other.state_dict())
    assert os.listdir(folder.parent) == ["model"]


def test_weights_hash_counts_names_dtypes_shapes_and_bits() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    variants = [
        base,
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"].int(), "b": base["b"]},
        {"a": -base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({weights_sha256(weights) for weights in variants}) == len(variants)
    assert weights_sha256(dict(reversed(base.items()))) == weights_sha256(base)
    assert weights_sha256({"a": torch.arange(6.0).view(2, 3).T}) == weights_sha256(
        {"a": torch.arange(6.0).view(2, 3).T.contiguous()}
    )
    assert weights_sha256({"a": torch.tensor(1.0)}) != weights_sha256({"a": torch.tensor([1.0])})


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", MANIFEST, WEIGHTS, "README.md"])
def test_a_flipped_bit_anywhere_is_a_refusal_that_names_the_file(folder: Path, name: str) -> None:
    generator, file = random.Random(name), folder / name
    original = file.read_bytes()
    missed = []
    for _ in range(60):
        bit = generator.randrange(8 * len(original))
        data = bytearray(original)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        try:
            load_model(folder)
            missed.append((bit, "loaded"))
        except CheckpointError as error:
            if name != MANIFEST and error.file != file:
                missed.append((bit, str(error)))
        except Exception as error:
            missed.append((bit, repr(error)))
    assert missed == []


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_truncated_weights_are_refused(foreign: Path, kept: int) -> None:
    data = (foreign / WEIGHTS).read_bytes()
    (foreign / WEIGHTS).write_bytes(data[:kept])
    refusal(foreign, WEIGHTS)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(foreign: Path, name: str) -> None:
    (foreign / name).unlink()
    assert "cannot read" in refusal(foreign, name)


def test_a_missing_folder_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"give a folder with config\.json"):
        load_model(tmp_path / "absent")


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(foreign: Path) -> None:
    tensors = tensors_of(foreign)
    tensors["extra"] = torch.zeros(3)
    del tensors["transformer.norm.weight"]
    tensors[QKV] = tensors[QKV][:-1].clone()
    save_file(tensors, foreign / WEIGHTS)
    what = refusal(foreign, WEIGHTS)
    assert "missing transformer.norm.weight" in what
    assert "unexpected extra" in what
    assert f"{QKV} has shape (59, 20), the config asks for (60, 20)" in what


def test_many_misfits_are_counted_not_all_printed(foreign: Path) -> None:
    save_file({f"junk{i}": torch.zeros(1) for i in range(500)}, foreign / WEIGHTS)
    what = refusal(foreign, WEIGHTS)
    assert what.endswith(" and 521 more")
    assert len(what) < 500


def test_an_untied_head_is_not_silently_dropped(foreign: Path) -> None:
    save_file({**tensors_of(foreign), "lm_head.weight": torch.zeros(31, 20)}, foreign / WEIGHTS)
    assert refusal(foreign, WEIGHTS) == "unexpected lm_head.weight"


@pytest.mark.parametrize("vocab_size", [30, 32])
def test_a_vocabulary_that_does_not_fit_is_refused(foreign: Path, vocab_size: int) -> None:
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
    assert f"(31, 20), the config asks for ({vocab_size}, 20)" in refusal(foreign, WEIGHTS)


def test_absurd_sizes_in_the_config_cost_nothing(foreign: Path) -> None:
    config = json.loads((foreign / "config.json").read_text())
    huge = {"vocab_size": 1_000_000, "model_dim": 65_536}  # 262 GB in fp32
    (foreign / "config.json").write_text(json.dumps({**config, **huge}))
    assert "the config asks for (1000000, 65536)" in refusal(foreign, WEIGHTS)


@pytest.mark.parametrize(
    "content", [b"", b"not json", b"[]", b"[" * 100_000, b'{"model_type": "llama"}', b"\xff"], ids=lambda c: c[:12]
)
def test_a_config_that_is_none_is_refused(foreign: Path, content: bytes) -> None:
    (foreign / "config.json").write_bytes(content)
    refusal(foreign, "config.json")


@pytest.mark.parametrize("change", [{"num_kv_heads": [1]}, {"head_dim": 7}, {"vocab_size": "many"}], ids=str)
def test_a_config_of_impossible_values_is_a_damaged_checkpoint(foreign: Path, change: dict[str, Any]) -> None:
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, **change}))
    assert next(iter(change)) in refusal(foreign, "config.json")


@pytest.mark.parametrize("manifest", ["[" * 100_000, '{"files": {"config.json": {"bytes": 1e999, "sha256": ""}}}'])
def test_a_hostile_manifest_is_refused(folder: Path, manifest: str) -> None:
    (folder / MANIFEST).write_text(manifest)
    refusal(folder, MANIFEST)


def test_a_manifest_that_leaves_out_the_weights_vouches_for_nothing(folder: Path) -> None:
    entries = json.loads((folder / MANIFEST).read_bytes())["files"]
    del entries[WEIGHTS]
    (folder / MANIFEST).write_bytes(manifest_bytes(entries))
    with pytest.raises(CheckpointError):
        load_model(folder)


def with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Rewrite the header of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    changed = change(json.loads(data[8 : 8 + size]))
    header = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def entry(name: str, value: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda header: {**header, QKV: {**header[QKV], name: value}}


HEADER_LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda header: list(header),
    "deep": lambda header: b"[" * 100_000,
    "not UTF-8": lambda header: b"\xff\xfe\xfd",
    "no entry": lambda header: {**header, QKV: None},
    "shape is a number": entry("shape", 5),
    "shape is text": entry("shape", "ab"),
    "shape is deep": entry("shape", [[60], 20]),
    "shape is negative": entry("shape", [-60, -20]),
    "no dtype": entry("dtype", None),
    "unknown dtype": entry("dtype", "F31"),
    "wider dtype": entry("dtype", "F64"),
    "offsets far away": entry("data_offsets", [0, 1 << 60]),
    "offsets backwards": entry("data_offsets", [4800, 0]),
    "offsets negative": entry("data_offsets", [-4800, 0]),
    "offsets of another": lambda header: entry("data_offsets", header["transformer.norm.weight"]["data_offsets"])(
        header
    ),
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_a_lying_header_is_refused(foreign: Path, lie: str) -> None:
    data = (foreign / WEIGHTS).read_bytes()
    (foreign / WEIGHTS).write_bytes(with_header(data, HEADER_LIES[lie]))
    refusal(foreign, WEIGHTS)


@pytest.mark.parametrize("size", [1 << 63, (16 << 20) + 1, 10_000_000])
def test_a_header_of_absurd_length_is_refused(foreign: Path, size: int) -> None:
    data = (foreign / WEIGHTS).read_bytes()
    (foreign / WEIGHTS).write_bytes(struct.pack("<Q", size) + data[8:])
    refusal(foreign, WEIGHTS)


def test_control_characters_in_tensor_names_are_escaped(foreign: Path) -> None:
    save_file({**tensors_of(foreign), "\x1b[2Jevil\n": torch.zeros(1)}, foreign / WEIGHTS)
    refusal(foreign, WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_of_a_dtype_that_cannot_be_computed_with_are_refused(foreign: Path, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in tensors_of(foreign).items()}, foreign / WEIGHTS)
    refusal(foreign, WEIGHTS)


def test_a_header_is_checked_without_reading_the_weights(foreign: Path) -> None:
    data = (foreign / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    with (foreign / WEIGHTS).open("wb") as file:  # as long as it was, and nothing in it
        file.write(data[: 8 + size])
        file.truncate(len(data))
    found = open_safetensors(foreign / WEIGHTS)
    assert not found[QKV].read().any()
    (foreign / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="the header describes"):
        open_safetensors(foreign / WEIGHTS)


def test_a_link_in_a_published_folder_is_refused(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")
    refusal(folder, WEIGHTS)


def test_a_failed_save_leaves_the_old_folder_and_nothing_else(
    folder: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = verify_folder(folder)
    tokenizer = ByteTokenizer()

    def fail(_: Path, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save", fail)
    for target in (folder, folder.parent / "other"):
        with pytest.raises(DiskError):
            save_model(target, make_model(seed=1), tokenizer=tokenizer, replace=True)
    assert verify_folder(folder) == before
    assert os.listdir(folder.parent) == ["model"]


def test_a_disk_that_fills_up_under_the_weights_is_a_disk_error(tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a stand-in for a full disk
        with pytest.raises(DiskError):
            save_model(tmp_path / "m", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_folder_says_whether_its_model_is_chat_tuned(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert not is_chat_tuned(tmp_path)
    for values, expected in (({}, False), ({"chat_tuned": False}, False), ({"chat_tuned": True}, True)):
        path.write_text(json.dumps({"bos_token_id": 1, **values}))
        assert is_chat_tuned(tmp_path) is expected
    path.write_text("[]")
    with pytest.raises(CheckpointError):
        is_chat_tuned(tmp_path)
