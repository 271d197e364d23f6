"""Checkpoints: published whole or not at all, verified on load, thinned only after a newer one was re-read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from openelm.config import Config
from openelm.errors import CheckpointError
from openelm.files import publish_folder, remove_folder, remove_leftovers, verify_folder, write_atomic
from openelm.model.folder import WEIGHTS, read_tensors, write_tensors

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


class CheckpointConfig(Config):
    """When to save and what to keep."""

    every: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Annotated[int, Field(ge=2)] = 5
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 keeps only the last ones."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: weights and optimizer moments by name, and the rest of the state as plain data."""

    step: int
    manifest_sha256: str
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(run: Path) -> list[int]:
    """List the steps of the run's published checkpoints, oldest first."""
    names = (path.name for path in (run / "checkpoints").glob("step-*") if path.is_dir())
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def save_checkpoint(
    run: Path,
    step: int,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> str:
    """Publish a checkpoint and re-read it; returns the SHA-256 of its manifest.

    Raises:
        DiskError: the disk is full or read-only; older checkpoints are intact.
        CheckpointError: what was written does not read back the same.
    """
    folder = checkpoint_folder(run, step)
    with publish_folder(folder, replace=True) as temporary:
        write_tensors(temporary / WEIGHTS, weights)
        write_tensors(temporary / OPTIMIZER, optimizer)
        write_atomic(temporary / STATE, json.dumps({**state, "step": step}, allow_nan=False).encode())
    return verify_folder(folder)


def load_checkpoint(run: Path, step: int) -> Checkpoint:
    """Verify a checkpoint against its manifest and read it.

    Raises:
        CheckpointError: it is damaged; names the file.
    """
    folder = checkpoint_folder(run, step)
    digest = verify_folder(folder)
    state = json.loads((folder / STATE).read_bytes())
    return Checkpoint(step, digest, read_tensors(folder / WEIGHTS), read_tensors(folder / OPTIMIZER), state)


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[tuple[int, CheckpointError]]]:
    """Read the newest checkpoint that verifies; also returns the newer steps and what was wrong with them."""
    damage: list[tuple[int, CheckpointError]] = []
    for step in reversed(checkpoint_steps(run)):
        try:
            return load_checkpoint(run, step), damage
        except CheckpointError as error:
            damage.append((step, error))
    return None, damage


def thin_checkpoints(run: Path, config: CheckpointConfig) -> None:
    """Remove checkpoints that the config does not keep.

    Kept are the newest, the last ones before it that are multiples of `every`, and the multiples of `keep_every`.
    What a stop saved in between goes with the next checkpoint, so a stop does not change what is averaged.
    """
    *older, newest = checkpoint_steps(run)
    regular = [step for step in older if step % config.every == 0]
    kept = {newest, *regular[-(config.keep_last - 1) :]}
    for step in older:
        if step not in kept and not (config.keep_every and step % config.keep_every == 0):
            remove_folder(checkpoint_folder(run, step))


def clean_checkpoints(run: Path) -> None:
    """Remove what a killed save left behind; only for the process that holds the run's lock."""
    remove_leftovers(run / "checkpoints")
