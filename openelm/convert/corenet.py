"""CoreNet: `.pt` checkpoints of Apple's training, bare or with the trainer's state, with or without adapters."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from openelm.convert import unpickle
from openelm.convert.adapters import merged
from openelm.convert.source import Source, config_of
from openelm.errors import CheckpointError
from openelm.model.weights import LazyTensor, Weights, bytes_of

PREFIX = "transformer."
"""What the Hugging Face names have before CoreNet's; nothing else differs, and no tensor is permuted."""
_HEAD = {"classifier.weight": "lm_head.weight"}
_DATA_PARALLEL = "module."
_LINE_BYTES_MAX = 64 << 20
_FIX = "give a .pt file that CoreNet wrote"


def published_name(name: str) -> str:
    """Give the Hugging Face name of a tensor of CoreNet or of Apple's MLX example."""
    return name if name == "lm_head.weight" else _HEAD.get(name, PREFIX + name)


def corenet_name(name: str) -> str:
    """Give the name that a tensor of the Hugging Face release has in CoreNet."""
    back = {published: ours for ours, published in _HEAD.items()}
    return back.get(name, name.removeprefix(PREFIX))


@contextlib.contextmanager
def open_corenet(path: Path) -> Iterator[Source]:
    """Open a checkpoint; its tensors can be read while the block lasts.

    Raises:
        CheckpointError: it is no checkpoint of an OpenELM, or asks for more than a file of tensors may.
    """
    if not path.is_file() or path.is_symlink():
        raise CheckpointError("missing, or not a plain file", file=path, fix=_FIX)
    command = [sys.executable, "-I", unpickle.__file__, str(path.absolute())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        try:
            found = _listed(child, path)
            plain, notes = merged({name.removeprefix(_DATA_PARALLEL): found[name] for name in found}, path)
            weights = {published_name(name): tensor for name, tensor in plain.items()}
            yield Source(path, "corenet", config_of(weights, path), weights, notes=notes).checked()
        finally:
            child.kill()


def _listed(child: subprocess.Popen[bytes], path: Path) -> dict[str, LazyTensor]:
    assert child.stdout is not None
    try:
        line = json.loads(child.stdout.readline(_LINE_BYTES_MAX))
    except ValueError:
        raise CheckpointError("reading it took more than a file of tensors may", file=path, fix=_FIX) from None
    if isinstance(line, dict):
        raise CheckpointError(f"not a checkpoint of weights: {line['refused']}", file=path, fix=_FIX)
    weights = {}
    for number, (name, dtype_name, shape) in enumerate(line):
        dtype = getattr(torch, dtype_name)
        weights[name] = LazyTensor(dtype, tuple(shape), _reader(child, number, tuple(shape), dtype, path))
    return weights


def _reader(
    child: subprocess.Popen[bytes], number: int, shape: tuple[int, ...], dtype: torch.dtype, path: Path
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        assert child.stdin is not None and child.stdout is not None
        tensor = torch.empty(shape, dtype=dtype)
        memory = bytes_of(tensor)
        done = 0
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(f"{number}\n".encode())
            child.stdin.flush()
            done = child.stdout.readinto(memory)  # type: ignore[attr-defined]  # a BufferedReader: until it is full
        if done != len(memory):
            raise CheckpointError("the process that reads it died", file=path, fix=_FIX)
        return tensor

    return read


def write_corenet(path: Path, weights: Weights, written: Callable[[int], None] = lambda count: None) -> None:
    """Write a bare state dict as CoreNet reads it. It is a pickle, for the format has no other form.

    All tensors are in memory at once: the library that writes it wants them so.
    """
    read = {}
    for name, tensor in weights.items():
        read[corenet_name(name)] = tensor.read()
        written(tensor.bytes)
    torch.save(read, path)
