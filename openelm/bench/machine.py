"""Facts about this process that a measured number depends on; loads no torch."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


def allocator() -> str:
    """Name the memory allocator of this process: the library that was loaded before the C library's own, or that."""
    try:
        loaded = Path("/proc/self/maps").read_text()
    except OSError:
        loaded = os.environ.get("LD_PRELOAD", "")
    for name in _ALLOCATORS:
        if f"lib{name}" in loaded:
            return name
    return " ".join(filter(None, platform.libc_ver())) or "system"


def peak_bytes() -> int:
    """Return the most resident memory that this process has held."""
    try:  # not getrusage, whose maximum begins with that of the process which started this one
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
