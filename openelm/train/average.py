"""Average checkpoints: the released weights are the uniform mean of the last ones, summed in float64."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from openelm.errors import ConfigError
from openelm.train.checkpoint import checkpoint_steps, load_checkpoint


def average_checkpoints(run: Path, last: int) -> tuple[dict[str, Tensor], list[int]]:
    """Average the weights of a run's last checkpoints.

    Args:
        last: how many; the paper's release averages 5 (README-pretraining of the original code).

    Returns:
        The mean of each tensor, rounded once from float64 to the checkpoints' dtype, and the steps averaged.

    Raises:
        ConfigError: the run has fewer checkpoints.
        CheckpointError: one of them is damaged.
    """
    steps = checkpoint_steps(run)
    if last < 1 or len(steps) < last:
        raise ConfigError(
            f"cannot average the last {last} checkpoints: the run has {len(steps)}",
            file=run,
            fix=f"use --last with 1 to {len(steps)}" if steps else "train first",
        )
    chosen = steps[-last:]
    totals: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for step in chosen:
        for name, tensor in load_checkpoint(run, step).weights.items():
            dtypes[name] = tensor.dtype
            if name in totals:
                totals[name] += tensor
            else:
                totals[name] = tensor.to(torch.float64)
    return {name: (total / last).to(dtypes[name]) for name, total in totals.items()}, chosen
