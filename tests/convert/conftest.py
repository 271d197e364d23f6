"""Models of every published size's widths with few layers, and of widths that follow no rule; random, well scaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from openelm.model.config import ModelConfig
from openelm.model.folder import save_model
from openelm.model.sizes import model_size
from openelm.model.transformer import OpenELM
from openelm.text.tokenizer import Tokenizer, train_tokenizer

from ..conftest import ODD, randomise

PUBLISHED = ("270m", "450m", "1.1b", "3b")

Publish = Callable[..., Path]
Command = Callable[..., None]


def odd_config(**fields: object) -> ModelConfig:
    return ModelConfig.parse({**ODD, **fields})


def shallow(size: str, layers: Sequence[int] | None = None, **fields: object) -> ModelConfig:
    """A published size with a few of its layers: three of the first half, not too wide for a test, or those asked for.

    Args:
        layers: their numbers in the published model; -1 is the last.
    """
    config = model_size(size)
    plan = config.plan
    chosen = layers or (0, plan.layers // 5, plan.layers // 3)

    def some(row: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(row[layer] for layer in chosen)

    few = replace(plan, query_heads=some(plan.query_heads), kv_heads=some(plan.kv_heads), ffn_dims=some(plan.ffn_dims))
    return ModelConfig.from_plan(few, **{"vocab_size": 384, **fields})


def randomised(config: ModelConfig, seed: int = 0) -> OpenELM:
    return randomise(OpenELM(config), seed)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A SentencePiece model of 300 ids."""
    text = "the quick brown fox jumps over the lazy dog; a model talks, and nobody listens to what it says. " * 40
    return train_tokenizer([text], 300)


@pytest.fixture
def publish(tmp_path: Path, tokenizer: Tokenizer) -> Publish:
    """Return what publishes a model folder: `publish(config, dtype=…, name=…)`."""

    def publish(
        config: ModelConfig | None = None, *, dtype: torch.dtype = torch.float32, name: str = "model", seed: int = 0
    ) -> Path:
        config = config or odd_config()
        attached = tokenizer if config.vocab_size >= tokenizer.vocab_size else None
        save_model(tmp_path / name, randomised(config, seed).to(dtype), tokenizer=attached)
        return tmp_path / name

    return publish


@pytest.fixture
def mlx_command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return what runs a command of mlx-lm in this process, without what it would compile with a C++ compiler."""

    def run(name: str, *arguments: object) -> None:
        mx = pytest.importorskip("mlx.core")
        (found,) = entry_points(group="console_scripts", name=name)
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        mx.disable_compile()
        try:
            found.load()()
        finally:
            mx.enable_compile()

    return run
