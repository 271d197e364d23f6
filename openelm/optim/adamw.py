"""AdamW: PyTorch's fused kernel, called with our own tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from openelm.optim.config import OptimizerConfig

STATE = ("step", "exp_avg", "exp_avg_sq")


def update_adamw(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    config: OptimizerConfig,
    *,
    rate: float,
    weight_decay: float,
    divisor: Tensor | None,
    skip: Tensor | None = None,
) -> None:
    """Update weights and states (`STATE` of each weight) in place.

    Args:
        divisor: by what gradients are divided first, a scalar on their device; the kernel does it on the way and
            leaves the quotients in `gradients`. None: they are taken as they are.
        skip: on their device, 1 to leave weights and states as they are, else 0.
    """
    steps, first, second = ([state[place] for state in states] for place in range(3))
    with torch.no_grad():
        adamw(
            list(weights),
            list(gradients),
            first,
            second,
            [],
            steps,
            fused=True,
            grad_scale=divisor,
            found_inf=skip,
            amsgrad=False,
            beta1=config.beta1,
            beta2=config.beta2,
            lr=rate,
            weight_decay=weight_decay,
            eps=config.eps,
            maximize=False,
        )
