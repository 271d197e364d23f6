"""AdamW with the published decay exclusions, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from openelm.config import Config
from openelm.errors import CheckpointError
from openelm.model.parts import fill


class AdamWConfig(Config):
    """Decoupled weight decay (arXiv 1711.05101) with the published coefficients."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """For matrices, the embedding among them; vectors (norm scales) are not decayed."""


def build_adamw(config: AdamWConfig, model: nn.Module) -> torch.optim.AdamW:
    """Make the optimizer; one-dimensional parameters are exempt from weight decay, as published."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state as `parameter name/state name` -> tensor."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put named tensors back as the optimizer's state; of a sharded model each process takes its part.

    Raises:
        CheckpointError: a tensor is of no parameter of the model, or of another shape.
    """
    parameters = dict(model.named_parameters())
    learned = [name for name, parameter in parameters.items() if parameter.requires_grad]
    expected = {f"{name}/{key}" for name in learned for key in ("step", "exp_avg", "exp_avg_sq")} if tensors else set()
    if missing := sorted(expected - tensors.keys()):
        raise CheckpointError(f"the optimizer's tensor {missing[0]!r} is missing, and {len(missing) - 1} more")
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or tensor.shape != (() if key == "step" else parameter.shape):
            raise CheckpointError(f"the optimizer's tensor {path!r} does not fit this model")
        # Moments live beside their parameter; `step` is a scalar that the fused kernel wants there too.
        state = tensor.to(parameter.device, copy=True) if key == "step" else torch.empty_like(parameter)
        if key != "step":
            fill(state, tensor)
        optimizer.state[parameter][key] = state
