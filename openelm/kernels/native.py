"""The kernels in C++: the library for this CPU, and calls to it. Without one everything runs on plain torch."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from openelm.kernels.precision import cpu_multiplies_bf16

_DTYPES = (torch.float32, torch.bfloat16)
_INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2")
"""A CPU with one of them has those that follow."""


def kernels_name() -> str:
    """Name the kernels in use: the instruction set of the C++ ones, or `torch`."""
    return (_built() if _library() else None) or "torch"


def native_missing() -> str | None:
    """Say why there are no C++ kernels where there could be some, and what to do; None where all is well."""
    name = _instruction_set()
    if name is None or _library():
        return None
    return (
        f"the {name} kernels are not built; install a C++ compiler, then openelm again (pip install --force-reinstall)"
    )


def runs_native(*tensors: Tensor) -> bool:
    """Tell whether the C++ kernels take these tensors: fp32 or bf16 on a CPU, eagerly, and built for this CPU."""
    return (
        all(tensor.device.type == "cpu" and tensor.dtype in _DTYPES for tensor in tensors)
        and not torch.compiler.is_compiling()
        and _library() is not None
    )


def call(name: str, *arguments: Tensor | int | float | bool | None) -> None:
    """Call `openelm_<name>` with tensors as pointers, whole numbers as long and others as float; the last argument
    that it is given is the number of threads. The caller answers for shapes, strides and dtypes."""
    function = _function(name, tuple(map(type, arguments)))
    addresses = (part.data_ptr() if isinstance(part, Tensor) else part for part in arguments)
    function(*addresses, torch.get_num_threads())


def learns(*arguments: Any) -> bool:
    """Tell whether autograd wants a gradient of any of these."""
    return torch.is_grad_enabled() and any(isinstance(entry, Tensor) and entry.requires_grad for entry in arguments)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call an autograd Function; where nothing learns, without the bookkeeping that costs one token more than it."""
    if learns(*arguments):
        return function.apply(*arguments)  # type: ignore[no-untyped-call]
    return function.forward(SimpleNamespace(save_for_backward=lambda *tensors: None), *arguments)


@functools.cache
def _function(name: str, kinds: tuple[type, ...]) -> Any:
    """Find a function and say how its arguments are converted, once: a generated token makes many calls."""
    library = _library()
    assert library is not None
    function = library[f"openelm_{name}"]  # another object than last time, with types of its own
    numbers: dict[type, Any] = {int: ctypes.c_long, bool: ctypes.c_long, float: ctypes.c_float}
    function.argtypes = [*(numbers.get(kind, ctypes.c_void_p) for kind in kinds), ctypes.c_long]
    function.restype = None
    return function


def _instruction_set() -> str | None:
    """Name the best that this CPU has kernels for, of what torch uses, which ATEN_CPU_CAPABILITY can lower."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        return ("amx" if _allows_amx() else "avx512_bf16") if cpu_multiplies_bf16() else "avx512"
    return "avx2" if capability == "AVX2" else None


@functools.cache
def _allows_amx() -> bool:
    """Tell whether there are AMX's registers, which the system gives to those who ask: torch does, for the process."""
    has, asks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_init_amx"))
    return bool(has and asks and has() and asks())


@functools.cache
def _built() -> str | None:
    """Name the best instruction set that was built: old compilers leave out the newest."""
    best = _instruction_set()
    names = _INSTRUCTION_SETS[_INSTRUCTION_SETS.index(best) :] if best else ()
    return next((name for name in names if importlib.util.find_spec(f"openelm.kernels._{name}")), None)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Load the library for this CPU's instruction set."""
    name = _built()
    found = importlib.util.find_spec(f"openelm.kernels._{name}") if name else None
    if found is None or found.origin is None:
        return None
    try:
        return ctypes.CDLL(found.origin)
    except OSError:  # no libgomp among what torch has loaded
        return None
