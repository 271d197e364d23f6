"""Small models with different heads and widths in every layer, and random weights everywhere, norms included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from openelm.model.config import ModelConfig
from openelm.model.transformer import OpenELM

from ..conftest import randomise

MakeModel = Callable[..., OpenELM]


@pytest.fixture(scope="session")
def odd_config() -> ModelConfig:
    """Three layers that share no width; grouped, single and full-count KV heads."""
    return ModelConfig.parse(
        {
            "vocab_size": 31,
            "max_context_length": 64,
            "rope_max_length": 4096,
            "num_transformer_layers": 3,
            "model_dim": 20,
            "head_dim": 6,
            "num_query_heads": [2, 6, 3],
            "num_kv_heads": [1, 2, 3],
            "ffn_multipliers": [0.35, 1.4, 2.1],
            "ffn_dim_divisor": 7,
        }
    )


@pytest.fixture
def make_model(odd_config: ModelConfig) -> MakeModel:
    """Return a maker of odd models: `make_model(dtype, seed=…)`."""

    def make(dtype: torch.dtype = torch.float32, *, seed: int = 0, config: Any = None) -> OpenELM:
        return randomise(OpenELM(config or odd_config), seed).to(dtype)

    return make


@pytest.fixture
def model(make_model: MakeModel) -> OpenELM:
    """The odd model in float64."""
    return make_model(torch.float64)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three rows of 13 tokens."""
    return torch.randint(31, (3, 13), generator=torch.Generator().manual_seed(1))
