"""Choosing where to run."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
import time
from pathlib import Path

import torch

from openelm.errors import ConfigError
from openelm.kernels.linear import linear

DEVICES = ("auto", "cpu", "cuda", "mps")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def choose_device(name: str = "auto") -> torch.device:
    """Turn a name into a device; `auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        ConfigError: no such name, or the machine has no such device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(device for device in ("cuda", "mps", "cpu") if available[device]))
    if name not in available:
        raise ConfigError(f"no device is called {name!r}", fix=f"devices: {', '.join(DEVICES)}")
    if not available[name]:
        usable = [device for device, present in available.items() if present]
        raise ConfigError(f"this machine has no {name} device", fix=f"use one of: {', '.join(usable)}")
    return torch.device(name)


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


@functools.cache
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure this machine's rate for the model's own matrix product: the yardstick of MFU (about 0.5 s).

    Returns:
        FLOP/s, the best of twenty products of a shape that suits the device.
    """
    size = 1024 if device.type == "cpu" else 8192
    x = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(20):  # the best one: another program may be in the way of some
        began = time.perf_counter()
        linear(x, x).sum().item()
        best = min(best, time.perf_counter() - began)
    return float(2 * size**3 / best)


def reuse_freed_memory() -> None:
    """Ask glibc to keep freed blocks instead of returning them to the kernel; elsewhere do nothing.

    A training step frees and allocates the same large blocks again; fresh pages cost up to a third of a CPU step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
