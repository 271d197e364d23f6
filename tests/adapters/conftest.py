"""Small models whose layers share no width, with adapters whose every number matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openelm.adapters.adapter import adapter_weights, add_adapter
from openelm.adapters.config import TARGETS, AdapterConfig
from openelm.kernels.cross_entropy import linear_cross_entropy
from openelm.model.config import ModelConfig
from openelm.model.folder import save_model
from openelm.model.quantized import Quantization, hold_quantized, packed, rounded
from openelm.model.transformer import OpenELM
from openelm.model.weights import in_memory

from ..conftest import GROUPED, randomise

CONFIG = ModelConfig.parse(GROUPED)
LORA = AdapterConfig(rank=4, alpha=8, dropout=0.0)
DORA = AdapterConfig(kind="dora", rank=4, alpha=8, dropout=0.0)
DORA_EVERYWHERE = AdapterConfig(kind="dora", rank=4, alpha=8, dropout=0.0, targets=TARGETS)
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
ANSWERS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(2))

Adapt = Callable[..., OpenELM]


def small(**fields: Any) -> OpenELM:
    """A model whose logits are of the order of one."""
    model = randomise(OpenELM(ModelConfig.parse({**CONFIG.model_dump(), **fields})), seed=3)
    with torch.no_grad():
        model.transformer.norm.weight *= 0.2
    return model


def adapted(config: AdapterConfig, model: OpenELM | None = None) -> OpenELM:
    """A model with an adapter that has learned something."""
    model = small() if model is None else model
    add_adapter(model, config, seed=5)
    disturb(model)
    return model


def disturb(model: OpenELM) -> None:
    """Move every number of an adapter."""
    generator = torch.Generator().manual_seed(6)
    for tensor in adapter_weights(model).values():
        tensor += torch.randn(tensor.shape, generator=generator) * 0.1


def quantized(bits: int, model: OpenELM) -> OpenELM:
    """The same model with matrices of a few bits."""
    weights = model.state_dict()
    found = packed(in_memory(weights), bits, 32, lambda name: rounded(weights[name], bits, 32))
    with torch.device("meta"):
        result = OpenELM(model.config)
        hold_quantized(result, Quantization(bits=bits, group_size=32))  # type: ignore[arg-type]
    result.load_state_dict({name: tensor.read() for name, tensor in found.items()}, assign=True)
    return result.requires_grad_(False)


def loss_and_gradients(model: OpenELM, *, whole_head: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Take the summed cross-entropy of a batch, and the gradients of all that learns."""
    hidden = model.hidden(TOKENS).flatten(0, 1)
    loss, _ = linear_cross_entropy(hidden, model.head_weight if whole_head else model.head_parts, ANSWERS.flatten())
    return loss.detach(), gradients(loss, model)


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(learning, torch.autograd.grad(loss, list(learning.values())), strict=True))


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, relative to each tensor's largest number."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of `small()`."""
    save_model(tmp_path / "base", small())
    return tmp_path / "base"
