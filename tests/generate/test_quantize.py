"""`quantize` and GPTQ: errors measured here by themselves, folders that load, and what is refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openelm.cli import main
from openelm.errors import CheckpointError, ConfigError, DataError, NumericError
from openelm.generate.gptq import rounded_for_products, rounded_to_searched
from openelm.generate.quantize import CALIBRATION_TOKENS, calibration_rows, quantize
from openelm.kernels.quantized import dequantised
from openelm.model.config import ModelConfig
from openelm.model.folder import load_model, save_model
from openelm.model.quantized import rounded
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer, train_tokenizer

from ..conftest import randomise

TEXT = "the quick brown fox jumps over the lazy dog; a model talks, and nobody listens to what it says. " * 40
FIELDS = {
    "vocab_size": 300,
    "max_context_length": 64,
    "num_transformer_layers": 2,
    "model_dim": 64,
    "head_dim": 16,
    "num_query_heads": [2, 4],
    "num_kv_heads": [1, 2],
    "ffn_multipliers": [0.5, 1.5],
    "ffn_dim_divisor": 32,
}


def shuffled(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(TEXT.split(), k=words))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 300)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    save_model(tmp_path / "model", randomise(OpenELM(ModelConfig.parse(FIELDS))), tokenizer=tokenizer, card="# mine\n")
    return tmp_path / "model"


def correlated(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Inputs of which a few directions carry most, and weights that know nothing of that."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    inputs = torch.randn(rows, columns, generator=generator) @ mixing
    return inputs, torch.randn(48, columns, generator=generator)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gptq_changes_products_less_than_rounding_does(group: int, dtype: torch.dtype) -> None:
    inputs, weight = correlated(2000, 256)
    weight = weight.to(dtype)

    def lost(parts: tuple[Tensor, Tensor, Tensor]) -> float:
        return float((inputs @ (dequantised(*parts, 4, group).float() - weight.float()).T).norm())

    gptq = rounded_for_products(weight, inputs.T @ inputs, 4, group)
    assert lost(gptq) < 0.5 * lost(rounded(weight, 4, group))
    assert gptq[1].dtype == dtype


def test_inputs_that_know_no_columns_change_nothing() -> None:
    """With a Hessian of equal eigenvalues there is nothing to make up for: each number goes to the nearest."""
    _, weight = correlated(1, 128)
    for found, expected in zip(
        rounded_for_products(weight, torch.eye(128), 4, 32), rounded_to_searched(weight, 4, 32), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("hessian", [torch.zeros(64, 64), torch.ones(64, 64)], ids=["no inputs", "one direction"])
def test_a_hessian_without_an_inverse_does(hessian: Tensor) -> None:
    parts = rounded_for_products(torch.randn(8, 64), hessian, 4, 32)
    assert torch.isfinite(dequantised(*parts, 4, 32)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_searched_range_is_never_worse_than_the_whole_one(bits: int) -> None:
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1] = 0, 0.3
    for group in (32, 64):
        errors = [
            (dequantised(*parts, bits, group) - weight).unflatten(-1, (-1, group)).square().sum(-1)
            for parts in (rounded_to_searched(weight, bits, group), rounded(weight, bits, group))
        ]
        assert errors[0].mean() < (0.9 if bits == 4 else 1.0) * errors[1].mean()
        assert errors[0][:2].max() < 1e-10


def divergence(folder: Path, exact: OpenELM, tokenizer: Tokenizer) -> float:
    """Measure the mean Kullback-Leibler divergence of next tokens on text like that of the calibration."""
    tokens = torch.tensor(tokenizer.encode(shuffled(1, 400))[: 64 * 8]).view(8, 64)
    with torch.no_grad():
        logs = [model(tokens).log_softmax(-1) for model in (exact, load_model(folder))]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def test_a_folder_is_quantised_and_gptq_is_nearer(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    exact = load_model(folder)
    for name, bits, texts in (("eight", 8, []), ("four", 4, []), ("gptq", 4, [shuffled(0, 8000)])):
        seen: list[tuple[int, int]] = []
        quantize(
            folder,
            tmp_path / name,
            bits=bits,
            method="gptq" if texts else "rtn",
            calibration=texts,
            written=lambda done, total, seen=seen: seen.append((done, total)),  # type: ignore[misc]
        )
        assert seen[-1][0] == seen[-1][1] and len(seen) > 10
    eight, four, gptq = (divergence(tmp_path / name, exact, tokenizer) for name in ("eight", "four", "gptq"))
    assert 0 < 20 * eight < four
    assert gptq < four
    card = (tmp_path / "gptq" / "README.md").read_text()
    assert card.startswith("# mine\n") and "4 bits" in card and "2210.17323" in card
    assert (tmp_path / "gptq" / "tokenizer.model").exists()


def test_a_head_of_its_own_is_quantised_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = ModelConfig.parse({**FIELDS, "share_input_output_layers": False})
    exact = randomise(OpenELM(config))
    save_model(tmp_path / "model", exact, tokenizer=tokenizer)
    quantize(tmp_path / "model", tmp_path / "four", bits=4)
    quantize(tmp_path / "model", tmp_path / "gptq", bits=4, method="gptq", calibration=[shuffled(0, 8000)])
    assert "lm_head.scales" in load_model(tmp_path / "gptq").state_dict()
    four, gptq = (divergence(tmp_path / name, exact, tokenizer) for name in ("four", "gptq"))
    assert gptq < four


def test_groups_are_the_largest_that_leave_no_matrix_out(folder: Path, tmp_path: Path) -> None:
    assert quantize(folder, tmp_path / "chosen", bits=4).group_size == 32, "a layer is 32 wide inside"
    assert quantize(folder, tmp_path / "given", bits=4, group=64).group_size == 64


def test_the_same_text_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantize(folder, tmp_path / name, bits=4, method="gptq", calibration=iter([TEXT]))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_calibration_rows_are_spread_over_the_text(tokenizer: Tokenizer) -> None:
    words = [" ".join(["fox"] * 500), " ".join(["dog"] * 500)]
    rows = calibration_rows(words, tokenizer, 64)
    assert rows.shape[1] == 64 and not torch.equal(rows[0], rows[-1])
    assert calibration_rows([TEXT] * 200, tokenizer, 64).shape == (CALIBRATION_TOKENS // 64, 64)


def test_what_cannot_be_done_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="3 bits"):
        quantize(folder, out, bits=3)
    with pytest.raises(ConfigError, match="groups of 16"):
        quantize(folder, out, bits=4, group=16)
    with pytest.raises(ConfigError, match="awq"):
        quantize(folder, out, bits=4, method="awq")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="calibration"):
        quantize(folder, out, bits=4, method="gptq", calibration=["short"])
    quantize(folder, out, bits=4)
    with pytest.raises(ConfigError, match="already"):
        quantize(out, tmp_path / "twice", bits=4)
    with pytest.raises(CheckpointError, match="exists"):
        quantize(folder, out, bits=8)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_numbers_that_are_not_finite_are_named_and_nothing_is_left(
    tmp_path: Path, tokenizer: Tokenizer, method: str
) -> None:
    model = randomise(OpenELM(ModelConfig.parse(FIELDS)))
    with torch.no_grad():
        model.transformer.layers[1].ffn.proj_2.weight[3, 5] = math.nan
    save_model(tmp_path / "model", model, tokenizer=tokenizer)
    with pytest.raises(NumericError, match=r"layers\.1\.ffn\.proj_2|not finite"):
        quantize(tmp_path / "model", tmp_path / "out", bits=4, method=method, calibration=[TEXT])  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_says_sizes_and_scores(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["quantize", str(folder), "-o", str(tmp_path / "out"), "--bits", "4"]
    assert main([*command, "--method", "gptq"]) == 2
    assert "--calibration" in capsys.readouterr().err
    assert main([*command, "--calibration", str(text), "--evaluate", str(text)]) == 0
    out = capsys.readouterr().out
    assert "4 bits by groups of 32, gptq" in out and "times less" in out and "bits per byte" in out
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found["quantised"] == "4 bits by groups of 32"
    assert size - 8192 < found["bytes"] < size
    assert main(["generate", str(tmp_path / "out"), "--prompt", "the", "--max-tokens", "3"]) == 0
