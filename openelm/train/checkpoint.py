"""Checkpoints: published whole or not at all, verified on load, thinned only after a newer one was re-read.

A model that several processes share is saved in parts: process k writes its rows of every tensor to
`model-00001-of-00004.safetensors`, and a tensor is its parts one after the other. Any number of processes reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from openelm.config import Config
from openelm.errors import CheckpointError
from openelm.files.atomic import disk_errors, remove_folder, remove_leftovers, sync_file, write_atomic
from openelm.files.hashes import read_file
from openelm.files.published import verify_folder
from openelm.model.folder import read_tensors, write_tensors

STATE = "state.json"


class CheckpointConfig(Config):
    """When to save and what to keep."""

    every: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Annotated[int, Field(ge=2)] = 5
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 keeps only the last ones."""
    background: bool = False
    """Whether training goes on while a copy of the state is written; costs the memory of the copy."""


class Tensors(Mapping[str, Tensor]):
    """Named tensors of one or more files; the parts of a tensor are put together when it is asked for."""

    def __init__(self, files: list[dict[str, Tensor]]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        found = [file[name] for file in self._files if name in file]
        if not found:
            raise KeyError(name)
        return found[0] if len(found) == 1 else torch.cat(found)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for file in self._files for name in file))

    def __len__(self) -> int:
        return len(set(self))


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: weights and optimizer moments by name, and the rest of the state as plain data."""

    step: int
    manifest_sha256: str
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any]


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(run: Path) -> list[int]:
    """List the steps of the run's published checkpoints, oldest first."""
    found = {path.name[5:] for path in (run / "checkpoints").glob("step-*") if path.is_dir()}
    steps = (int(digits) for digits in found if digits.isdecimal())
    return sorted(step for step in steps if f"{step:08d}" in found)


def write_part(
    folder: Path, part: int, count: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> None:
    """Write one of `count` parts to a folder that is not yet published, and wait until it is on disk.

    Numbers that have no rows to share are in the first part.

    Raises:
        DiskError: the disk is full or read-only.
    """
    with disk_errors(folder):
        for stem, tensors in (("model", weights), ("optimizer", optimizer)):
            path = folder / _part_name(stem, part, count)
            write_tensors(path, {name: value for name, value in tensors.items() if value.ndim or part == 0})
            sync_file(path)


def write_state(folder: Path, step: int, count: int, state: Mapping[str, Any]) -> None:
    """Write the rest of the state beside all `count` parts; the folder can be published then.

    Raises:
        DiskError: the disk is full or read-only.
    """
    write_atomic(folder / STATE, json.dumps({**state, "step": step, "parts": count}).encode())


def _part_name(stem: str, part: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{part + 1:05d}-of-{count:05d}.safetensors"


def load_checkpoint(run: Path, step: int) -> Checkpoint:
    """Verify a checkpoint against its manifest and read it.

    Raises:
        CheckpointError: it is damaged; names the file.
    """
    folder = checkpoint_folder(run, step)
    try:
        state = json.loads(read_file(folder / STATE))
        count = int(state["parts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError("missing or damaged", file=folder / STATE) from None
    names = [[_part_name(stem, part, count) for part in range(count)] for stem in ("model", "optimizer")]
    digest = verify_folder(folder, names=(STATE, *names[0], *names[1]))
    weights, optimizer = (Tensors([read_tensors(folder / name) for name in stem]) for stem in names)
    return Checkpoint(step, digest, weights, optimizer, state)


def check_names(weights: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> None:
    """Compare a checkpoint's weights with what a model learns, by name and shape.

    Raises:
        CheckpointError: names the first that differs.
    """
    expected = {name: tuple(value.shape) for name, value in learned.items()}
    for name in sorted(expected.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else None
        if found != expected.get(name):
            raise CheckpointError(f"{name} has shape {found} in the checkpoint, {expected.get(name)} in the model")


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[tuple[int, CheckpointError]]]:
    """Read the newest checkpoint that verifies; also returns the newer steps and what was wrong with them."""
    damage: list[tuple[int, CheckpointError]] = []
    for step in reversed(checkpoint_steps(run)):
        try:
            return load_checkpoint(run, step), damage
        except CheckpointError as error:
            damage.append((step, error))
    return None, damage


def thin_checkpoints(run: Path, config: CheckpointConfig, *, finished: bool) -> None:
    """Remove checkpoints that the config does not keep.

    Kept are the newest, the last ones before it that are multiples of `every`, and the multiples of `keep_every`.
    What a stop saved in between stays while there is no other to fall back to, and goes when the run is finished, so
    that a stop does not change what is averaged.
    """
    *older, newest = checkpoint_steps(run)
    regular = [step for step in older if step % config.every == 0][-(config.keep_last - 1) :]
    kept = {newest, *(regular or (older[-1:] if not finished else ()))}
    for step in older:
        if step not in kept and not (config.keep_every and step % config.keep_every == 0):
            remove_folder(checkpoint_folder(run, step))


def clean_checkpoints(run: Path) -> None:
    """Remove what a killed save left behind; only for the process that holds the run's lock."""
    remove_leftovers(run / "checkpoints")
