"""How numbers are held and multiplied: shared by the kernels of this room."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums and roots are taken: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Tell whether this CPU has bfloat16 dot products; without them bf16 GEMM is many times slower than fp32."""
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def mkl_knows_this_cpu() -> bool:
    """Tell whether MKL runs its best code here, which it does on Intel's CPUs alone."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def matmul_dtype(*operands: Tensor) -> torch.dtype:
    """Return the dtype to which a product of `operands` rounds them: autocast's where it is on, else the promoted one.

    float64 is never rounded, as in torch.autocast.
    """
    promoted = functools.reduce(torch.promote_types, (operand.dtype for operand in operands))
    kind = operands[0].device.type
    if promoted != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return promoted


def emulates_bf16(x: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether products of bf16 numbers are better taken in fp32 (exact products, fp32 sums) here.

    Only eagerly: a compiler or exporter wants the plain formula.
    """
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return dtype == torch.bfloat16 and eager and not cpu_multiplies_bf16()
