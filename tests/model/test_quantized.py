"""Matrices of few bits: the layout, folders that load and run, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openelm.errors import CheckpointError, ConfigError
from openelm.kernels.quantized import dequantised, pack, quantized_linear, unpack
from openelm.model.cache import KeyValueCache
from openelm.model.folder import load_model, save_model
from openelm.model.quantized import Quantization, QuantizedEmbedding, QuantizedLinear, rounded

from .conftest import GROUPED, MakeFolder

TOKENS = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_numbers_come_back(bits: int) -> None:
    numbers = torch.randint(1 << bits, (5, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    words = pack(numbers, bits)
    assert words.dtype == torch.uint32 and words.shape == (5, 96 * bits // 32)
    assert torch.equal(unpack(words, bits), numbers)


def test_the_first_number_of_a_word_is_in_its_lowest_bits() -> None:
    assert pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15]]), 4).view(torch.int32).item() == 0xF7654321 - (1 << 32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_that_of_mlx_to_the_bit(bits: int, dtype: torch.dtype) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1], weight[2], weight[3], weight[4, ::2] = 0, 3, weight[2].abs(), -weight[3].abs(), 0
    weight = weight.to(dtype)
    narrow = {torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}.get(dtype)
    array = mx.array(weight.view(torch.uint16).numpy()).view(narrow) if narrow else mx.array(weight.numpy())
    for group in (32, 64):
        theirs = mx.quantize(array, group_size=group, bits=bits)
        for ours, part in zip(rounded(weight, bits, group), theirs, strict=True):
            raw = torch.frombuffer(bytearray(bytes(memoryview(part.view(mx.uint8)))), dtype=torch.uint8)
            assert torch.equal(ours.reshape(-1).view(torch.uint8), raw)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_number_is_within_a_step(bits: int) -> None:
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    words, scales, biases = rounded(weight, bits, 32)
    apart = (dequantised(words, scales, biases, bits, 32) - weight).abs().unflatten(-1, (-1, 32)).amax(-1)
    assert (apart <= scales.abs()).all(), "half a step inside; meeting zero may move the end that is nearer to it"


def test_a_product_is_that_of_the_numbers() -> None:
    weight, x = torch.randn(20, 64), torch.randn(3, 5, 64)
    parts = rounded(weight, 4, 32)
    expected = x @ dequantised(*parts, 4, 32).T
    torch.testing.assert_close(quantized_linear(x, *parts, 4, 32), expected)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (4, 64)])
@pytest.mark.parametrize("shared", [True, False], ids=["tied", "own head"])
def test_a_quantised_folder_computes_what_its_numbers_do(
    make_folder: MakeFolder, bits: int, group: int, shared: bool
) -> None:
    folder = make_folder(bits, group, share_input_output_layers=shared)
    model = load_model(folder)
    assert model.quantization == Quantization(bits=bits, group_size=group)  # type: ignore[arg-type]
    assert isinstance(model.transformer.token_embeddings, QuantizedEmbedding)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), load_model(folder.parent / "plain")(TOKENS))


def test_rows_that_are_not_whole_groups_stay(make_folder: MakeFolder) -> None:
    model = load_model(make_folder(4, 64))
    kinds = [type(layer.ffn.proj_2) for layer in model.transformer.layers]
    assert [kind is QuantizedLinear for kind in kinds] == [False, True, False], "widths of 32, 64 and 96"


def test_bfloat16_and_a_cast_to_float32(make_folder: MakeFolder) -> None:
    folder = make_folder(dtype=torch.bfloat16)
    with torch.no_grad():
        narrow, plain = load_model(folder)(TOKENS), load_model(folder.parent / "plain")(TOKENS)
        wide = load_model(folder, dtype=torch.float32)(TOKENS)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, plain)
    assert wide.dtype == torch.float32 and (wide - plain.float()).abs().mean() < 0.05


def test_decoding_with_a_cache_is_the_full_forward_pass(make_folder: MakeFolder) -> None:
    model = load_model(make_folder())
    cache = KeyValueCache(GROUPED.plan, 2, 20)
    with torch.no_grad():
        steps = [model(TOKENS[:, :9], cache=cache), *(model(TOKENS[:, i : i + 1], cache=cache) for i in range(9, 20))]
        torch.testing.assert_close(torch.cat(steps, 1), model(TOKENS), atol=1e-5, rtol=1e-5)


def test_a_saved_quantised_model_is_the_same_folder(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(8)
    save_model(tmp_path / "again", load_model(folder))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_mlx_lm_loads_the_same_folder(make_folder: MakeFolder) -> None:
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    folder = make_folder()
    theirs, _ = utils.load_model(folder)
    with torch.no_grad():
        ours = load_model(folder)(TOKENS)
    assert (torch.tensor(theirs(mx.array(TOKENS.numpy())).tolist()) - ours).abs().max() < 1e-3


def test_training_is_refused(make_folder: MakeFolder) -> None:
    model = load_model(make_folder())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="quantised weights cannot be trained"):
        model.head_weight  # noqa: B018  (what every objective asks for)


@pytest.mark.parametrize(
    ("quantization", "what"),
    [
        ({"group_size": 64, "bits": 3}, "bits"),
        ({"group_size": 7, "bits": 4}, "group_size"),
        ({"group_size": 64}, "bits"),
        ({"bits": True, "group_size": 32}, "bits"),
        ({"bits": "4", "group_size": 32}, "bits"),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mode"),
        ({"group_size": 32, "bits": 4, "transformer.layers.0.attn.qkv_proj": False}, "unknown key"),
        ([4, 32], "quantization"),
        (4, "quantization"),
    ],
)
def test_a_config_of_another_kind_is_refused(make_folder: MakeFolder, quantization: Any, what: str) -> None:
    folder = make_folder()
    rewrite(folder, quantization=quantization)
    with pytest.raises(CheckpointError, match=what) as caught:
        load_model(folder)
    assert "bits: 4, 8; group_size: 32, 64" in caught.value.fix


@pytest.mark.parametrize(("same", "loads"), [({"group_size": 32, "bits": 4}, True), ({"quant_method": "gptq"}, False)])
def test_what_mlx_lm_writes_twice_must_be_equal(make_folder: MakeFolder, same: object, loads: bool) -> None:
    folder = make_folder()
    rewrite(folder, quantization_config=same)
    if loads:
        assert load_model(folder).quantization is not None
        return
    with pytest.raises(CheckpointError, match="quantization_config"):
        load_model(folder)
    rewrite(folder, quantization=None)
    with pytest.raises(CheckpointError, match="quantization_config"):
        load_model(folder)


QKV = "transformer.layers.1.attn.qkv_proj"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop(f"{QKV}.scales"), f"missing {QKV}.scales"),
        (lambda t: t.update({f"{QKV}.biases": t[f"{QKV}.biases"][:, :1]}), f"{QKV}.biases has shape"),
        (lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"].view(torch.float32)}), f"{QKV}.weight is of float32"),
        (lambda t: t.update({f"{QKV}.scales": t[f"{QKV}.scales"].view(torch.uint32)}), f"{QKV}.scales is of uint32"),
        (lambda t: t.update({f"{QKV}.extra": t[f"{QKV}.scales"].clone()}), f"unexpected {QKV}.extra"),
    ],
    ids=["scales missing", "biases misshapen", "numbers for words", "words for numbers", "one too many"],
)
def test_tensors_that_do_not_fit_are_refused(make_folder: MakeFolder, change: Callable[..., Any], what: str) -> None:
    folder = make_folder()
    (folder / "manifest.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=what):
        load_model(folder)


def test_words_without_a_word_in_the_config_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    rewrite(folder, quantization=None)
    with pytest.raises(CheckpointError, match="U32"):
        load_model(folder)


def rewrite(folder: Path, **values: object) -> None:
    """Change a folder's config; None takes a key out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    (folder / "manifest.json").unlink(missing_ok=True)
