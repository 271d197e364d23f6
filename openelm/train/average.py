"""Average checkpoints: the released weights are the uniform mean of the last ones, summed in float64."""

from __future__ import annotations

from collections.abc import Sequence
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
        The mean of each tensor, rounded once from float64 to fp32 (of float64 never), and the steps averaged.

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
    return mean_of_checkpoints(run, chosen), chosen


def mean_of_checkpoints(run: Path, steps: Sequence[int]) -> dict[str, Tensor]:
    """Return the mean of each tensor over checkpoints, rounded once from float64 to fp32.

    Raises:
        CheckpointError: one of them is missing or damaged.
    """
    totals: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for step in steps:
        for name, tensor in load_checkpoint(run, step).weights.items():
            dtypes[name] = torch.promote_types(tensor.dtype, torch.float32)
            if name in totals:
                totals[name] += tensor
            else:
                totals[name] = tensor.to(torch.float64)
    return {name: (total / len(steps)).to(dtypes[name]) for name, total in totals.items()}
