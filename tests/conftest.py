"""What every test of the suite stands on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from openelm.model.transformer import OpenELM


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


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: the tests' models are too small to share, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(model: OpenELM, seed: int = 0) -> OpenELM:
    """Draw weights with which every part of a model matters: norms between 0.3 and 1.7, matrices by their width."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.3, 1.7, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return model
