"""Small models with different heads and widths in every layer, and random weights everywhere, norms included."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from openelm.kernels.quantized import dequantised
from openelm.model import static_step, transformer
from openelm.model.config import ModelConfig
from openelm.model.folder import save_weights
from openelm.model.quantized import packed, rounded
from openelm.model.transformer import OpenELM
from openelm.model.weights import in_memory

from ..conftest import GROUPED as FIELDS
from ..conftest import randomise

MakeModel = Callable[..., OpenELM]
MakeFolder = Callable[..., Path]
GROUPED = ModelConfig.parse({**FIELDS, "vocab_size": 40})
"""Rows of whole groups of 32."""


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


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a maker of quantised folders, and beside each, in `plain`, the numbers that its words stand for."""

    def make(bits: int = 4, group: int = 32, dtype: torch.dtype = torch.float32, **fields: object) -> Path:
        config = GROUPED.model_copy(update=fields)
        weights = in_memory(randomise(OpenELM(config)).to(dtype).state_dict())
        words = packed(weights, bits, group, lambda name: rounded(weights[name].read(), bits, group))
        save_weights(tmp_path / "packed", config, words, quantization={"group_size": group, "bits": bits})
        whole = {
            name: dequantised(*rounded(tensor.read(), bits, group), bits, group)
            if tensor.shape[-1] % group == 0 and len(tensor.shape) == 2
            else tensor.read()
            for name, tensor in weights.items()
        }
        save_weights(tmp_path / "plain", config, in_memory(whole))
        return tmp_path / "packed"

    return make


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Choose what takes the place of Inductor, and forget what was compiled before and since."""

    def choose(backend: str) -> None:
        torch._dynamo.reset()
        counters.clear()
        one = functools.cache(lambda function: torch.compile(function, backend=backend, fullgraph=True))
        for module in (transformer, static_step):
            monkeypatch.setattr(module, "compiled", one)

    yield choose
    torch._dynamo.reset()


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> OpenELM:
    model, generator = OpenELM(config), torch.Generator().manual_seed(3)
    model.initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype)


def some_ids(model: OpenELM, *shape: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(4))
