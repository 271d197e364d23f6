"""Matrix products of the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.kernels.precision import emulates_bf16, matmul_dtype

_FEW_ROWS = 32  # below this, reading the weight costs more than multiplying: bf16 as it is reads the least
_CHUNK_ROWS = 1024  # fp32 copies of this many rows stay in the cache and below malloc's page-returning threshold


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows by a weight: x (..., in) @ weight (out, in).T -> (..., out).

    Follows torch.autocast. On a CPU without bf16 units the bf16 product is taken in fp32: the operands and the result
    are rounded to bf16, the products and sums are fp32, which is what bf16 hardware computes.
    """
    dtype = matmul_dtype(x, weight)
    few = x.numel() < _FEW_ROWS * x.shape[-1]
    if few or not emulates_bf16(x, dtype):
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _RoundedLinear.apply(rows, weight)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], weight.shape[0])


def rounded(x: Tensor) -> Tensor:
    """Round to bf16 and return the rounded numbers as fp32."""
    return x.to(torch.bfloat16).float()


class _RoundedLinear(torch.autograd.Function):
    """bf16 in and out, fp32 between; chunk by chunk, so that the wide copies are small and reused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        wide_weight = rounded(weight).t()
        out = x.new_empty(x.shape[0], weight.shape[0])
        scratch = torch.empty(min(len(x), _CHUNK_ROWS), weight.shape[0])
        for start in range(0, len(x), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            wide_out = scratch[: len(x) - start]
            torch.mm(x[part].float(), wide_weight, out=wide_out)
            out[part] = wide_out
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        wide_weight = rounded(weight) if needs_x else weight
        x_gradient = torch.empty(x.shape) if needs_x else None
        weight_gradient = torch.zeros(weight.shape) if needs_weight else None
        for start in range(0, len(x), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            wide_gradient = gradient[part].float()
            if x_gradient is not None:
                torch.mm(wide_gradient, wide_weight, out=x_gradient[part])
            if weight_gradient is not None:
                weight_gradient.addmm_(wide_gradient.t(), x[part].float())
        return x_gradient, weight_gradient
