"""Other runtimes load what we export, and compute the same: whole rows at once, and token by token with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openelm.convert.convert import Options, open_source, prepared, write
from openelm.model.config import ModelConfig
from openelm.model.folder import load_model

from .conftest import PUBLISHED, Publish, odd_config, shallow

pytestmark = pytest.mark.filterwarnings("default")

APART = 1e-3
TOKENS = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(0))
SHAPES = ("odd", *PUBLISHED)


def shaped(size: str) -> ModelConfig:
    return odd_config() if size == "odd" else shallow(size)


def export(folder: Path, out: Path, to: str, **options: Any) -> Path:
    chosen = Options(to=to, **options)
    with open_source(folder) as source:
        write(prepared(source, chosen), out, chosen)
    return out


def ours(folder: Path, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return load_model(folder)(tokens)


@pytest.mark.parametrize("size", SHAPES)
def test_onnxruntime(publish: Publish, tmp_path: Path, size: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    config = shaped(size)
    folder = publish(config)
    session = runtime.InferenceSession(export(folder, tmp_path / "onnx", "onnx") / "model.onnx")

    def run(tokens: Tensor, past: list[Any], start: int) -> tuple[Tensor, list[Any]]:
        rows, length = tokens.shape
        feeds = {
            "input_ids": tokens.numpy(),
            "position_ids": np.arange(start, start + length)[None].repeat(rows, 0),
            "attention_mask": np.ones((rows, start + length), np.int64),
        }
        names = [entry.name for entry in session.get_inputs() if entry.name.startswith("past")]
        logits, *present = session.run(None, feeds | dict(zip(names, past, strict=True)))
        return torch.from_numpy(logits), present

    empty = [
        np.zeros((1, heads, 0, config.head_dim), np.float32) for heads in config.plan.kv_heads for _ in ("key", "value")
    ]
    whole, _ = run(TOKENS, empty, 0)
    assert (whole - ours(folder)).abs().max() < APART
    stepped, past = run(TOKENS[:, :52], empty, 0)
    parts = [stepped]
    for place in range(52, TOKENS.shape[1]):
        logits, past = run(TOKENS[:, place : place + 1], past, place)
        parts.append(logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < APART


@pytest.mark.parametrize("size", SHAPES)
def test_mlx_lm(publish: Publish, tmp_path: Path, size: str) -> None:
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    from mlx_lm.models.cache import make_prompt_cache

    folder = publish(shaped(size))
    model, tokenizer = mlx_lm.load(str(export(folder, tmp_path / "mlx", "mlx")))
    whole = torch.from_numpy(np.array(model(mx.array(TOKENS.numpy()))))
    assert (whole - ours(folder)).abs().max() < APART
    cache, parts = make_prompt_cache(model), []
    for part in (TOKENS[:, :52], *TOKENS[:, 52:].split(1, dim=1)):
        parts.append(torch.from_numpy(np.array(model(mx.array(part.numpy()), cache=cache))))
    assert (torch.cat(parts, 1) - whole).abs().max() < APART
    with open_source(folder) as source:
        assert source.tokenizer is not None
        text = "The fox talks, naïvely."
        assert tokenizer.encode(text) == [source.tokenizer.bos_id, *source.tokenizer.encode(text)]
