"""What every test of the suite stands on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

Model = TypeVar("Model", bound=torch.nn.Module)


def pytest_configure(config: pytest.Config) -> None:
    """Leave autograd without threads, which no fork survives: many tests run the command in forks.

    At its first backward pass it starts one for each GPU it sees. torch.compile makes a build for CUDA see eight where
    there is none, so that pass comes before; real ones are hidden unless the selection begins with `-m gpu`.
    """
    if not config.option.markexpr.startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.ones(1, requires_grad=True).backward()


def tiny_recipe(text: Path) -> dict[str, Any]:
    """A run of a second: 12 steps of two layers on one file, a checkpoint every third."""
    return {
        "model": {"layers": 2, "dim": 32, "head_dim": 8, "gqa_groups": 2, "ffn_dim_divisor": 16, "context": 32},
        "tokenizer": {"vocab_size": 300},
        "data": {
            "lanes": 2,
            "min_characters": 1,
            "min_tokens": 1,
            "workers": 0,
            "sources": [{"name": "tiny", "paths": [str(text)]}],
        },
        "train": {"steps": 12, "rows": 4, "length": 16, "precision": "fp32", "device": "cpu"},
        "schedule": {"peak": 0.01, "warmup_steps": 3},
        "checkpoints": {"every": 3, "keep_last": 5},
    }


ODD = {
    "vocab_size": 300,
    "max_context_length": 64,
    "rope_max_length": 256,
    "num_transformer_layers": 3,
    "model_dim": 64,
    "head_dim": 16,
    "num_query_heads": [2, 6, 3],
    "num_kv_heads": [1, 2, 3],
    "ffn_multipliers": [0.5, 1.5, 2.5],
    "ffn_dim_divisor": 32,
}
"""A model whose layers all differ, by the published fields."""
GROUPED = {
    **ODD,
    "num_query_heads": [2, 4, 6],
    "num_kv_heads": [1, 2, 3],
    "ffn_multipliers": [0.5, 1.0, 1.5],
    "rope_max_length": 4096,
}
"""Another, whose matrices' rows are whole groups of 32."""


def save_tiny_base(folder: Path) -> Path:
    """Publish a random model of two layers that reads bytes, to tune it."""
    from openelm.model.config import ModelConfig
    from openelm.model.folder import save_model
    from openelm.model.transformer import OpenELM
    from openelm.text.tokenizer import ByteTokenizer

    tokenizer = ByteTokenizer()
    config = ModelConfig.parse(
        {
            "vocab_size": tokenizer.vocab_size,
            "num_transformer_layers": 2,
            "model_dim": 32,
            "head_dim": 8,
            "num_gqa_groups": 2,
            "ffn_dim_divisor": 16,
            "max_context_length": 128,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
        }
    )
    model = OpenELM(config)
    model.initialise(torch.Generator().manual_seed(0))
    save_model(folder, model, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: the tests' models are too small to share, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(model: Model, seed: int = 0) -> Model:
    """Draw weights with which every part of a model matters: norms between 0.3 and 1.7, matrices by their width."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.3, 1.7, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return model
