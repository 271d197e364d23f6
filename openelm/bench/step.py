"""Updates of the trainer itself on one batch: what benchmarks time, without a run folder or data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from openelm.data.manifest import Manifest
from openelm.data.stream import Batch
from openelm.model.config import ModelConfig
from openelm.text.tokenizer import ByteTokenizer
from openelm.train.distributed import ALONE, Processes
from openelm.train.ledger import number
from openelm.train.objectives import NextToken
from openelm.train.run import Run, RunConfig
from openelm.train.update import Updater

Precision = Literal["fp32", "bf16"]
LEARNING_RATE = 1e-3


def trainer(
    config: ModelConfig,
    rows: int,
    length: int,
    *,
    precision: Precision,
    device: torch.device,
    settings: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
) -> Updater:
    """Make the updater that `openelm train` makes, with its defaults and a constant learning rate.

    Args:
        settings: fields of `train` in a recipe that replace their defaults, such as `numerics`.
    """
    recipe = {
        "model": {"context": max(length, config.max_context_length)},
        "data": {"manifest": "none"},
        "train": {"steps": 1_000_000, "rows": rows, "length": length, "device": device.type, **(settings or {})},
        "schedule": {"peak": LEARNING_RATE, "final_fraction": 1.0},
    }
    run = Run(Path("none"), RunConfig.parse(recipe), config, Manifest(()), None, ByteTokenizer(), device, precision)
    return Updater(run, NextToken(run.config.train.z_loss), processes)


def random_tokens(vocab_size: int, rows: int, length: int) -> Tensor:
    """Draw the same tokens (rows, length + 1) every time."""
    return torch.randint(0, vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(1))


def fixed_batch(tokens: Tensor) -> Batch:
    """Make a batch of (rows, length + 1) tokens, one document a row."""
    inputs, targets = tokens[:, :-1].contiguous().numpy(), tokens[:, 1:].contiguous().numpy()
    digests = bytearray().join(hashlib.sha256(row.tobytes()).digest() for row in tokens.numpy())
    row_sha256 = np.frombuffer(digests, np.uint8).reshape(len(tokens), 32)
    return Batch(inputs, targets, np.zeros(inputs.shape, np.int32), inputs.size, row_sha256)


@dataclass(frozen=True)
class Losses:
    """Nats a token of one update, before it."""

    cross_entropy: float
    z_loss: float


def update(updater: Updater, batch: Batch) -> Losses:
    """Do one update.

    Raises:
        NumericError: the loss or the gradient is not finite.
    """
    events, error = updater.update(batch)
    if error is not None:
        raise error
    return Losses(number(events[-1]["loss"]), number(events[-1]["z_loss"]))
