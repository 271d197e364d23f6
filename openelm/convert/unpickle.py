"""The child process that reads a PyTorch checkpoint; started by path, so that it imports nothing of ours.

Pickle is read here and nowhere else: weights only, the file mapped, where no connection can be opened, no program
started, no file written and little memory used. It writes one line of JSON, a list of [name, dtype, shape], and then,
for each number that it is given, the bytes of that tensor.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER and CLONE_NEWNET of unshare(2)
_FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.fork",
    "ctypes.dlopen",
)
_STATES = ("model_state_dict", "state_dict", "model")
_DTYPES = {"torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}
_SPARE_BYTES = 1 << 30


def main(path: str) -> None:
    size = os.path.getsize(path)
    ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK)  # before torch starts threads; where the kernel lets us
    import torch  # here, so that it is loaded without a network

    _confine(size)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = list(_tensors(found, size))
    except Exception as error:  # whatever a hostile file leads the library to
        _tell({"refused": " ".join(str(error).split())[:300] or type(error).__name__})
        return
    names = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors]
    _tell(names)
    for line in sys.stdin:
        tensor = tensors[int(line)][1].contiguous()
        if tensor.numel():
            sys.stdout.buffer.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        sys.stdout.buffer.flush()


def _tell(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _confine(file_bytes: int) -> None:
    """Give up what reading tensors does not need; each limit holds where another cannot be had."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * file_bytes + _SPARE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def forbid(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event.startswith(_FORBIDDEN):
            raise PermissionError(f"a checkpoint asked for {event}")

    sys.addaudithook(forbid)


def _tensors(found: Any, file_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's tensors: those of a bare state dict, or of the one inside a training checkpoint."""
    import torch

    if isinstance(found, Mapping):
        found = next((found[name] for name in _STATES if isinstance(found.get(name), Mapping)), found)
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds a {type(found).__name__}, not a dictionary of tensors")
    total = 0
    for name, tensor in found.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise ValueError(f"{name!r} is not a tensor")
        if tensor.layout != torch.strided or str(tensor.dtype) not in _DTYPES or tensor.device.type != "cpu":
            raise ValueError(f"{name!r} is a {tensor.layout} tensor of {tensor.dtype}, not of floating point numbers")
        total += tensor.numel() * tensor.element_size()
        if total > file_bytes:  # a view may repeat a few bytes without end
            raise ValueError("its tensors are larger than the file")
        yield name, tensor.detach()


if __name__ == "__main__":
    main(sys.argv[1])
