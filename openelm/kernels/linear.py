"""Matrix products of the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.kernels.native import apply, call, kernels_name, runs_native
from openelm.kernels.precision import emulates_bf16, matmul_dtype, mkl_knows_this_cpu

_CHUNK_ROWS = 1024  # fp32 results of this many rows stay in the cache until they are rounded


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows by a weight: x (..., in) @ weight (out, in).T -> (..., out).

    Follows torch.autocast. On a CPU without bf16 units the bf16 product is taken in fp32: the operands and the result
    are rounded to bf16, the products and sums are fp32, which is what bf16 hardware computes.
    """
    return _linear(x, weight, multiplies=True)


def keep_operands(x: Tensor, weight: Tensor) -> Tensor:
    """Keep for the backward pass what `linear` keeps; the result has its shape, and numbers that mean nothing.

    For activation checkpointing, which wants the operands of a product again and not the product.
    """
    return _linear(x, weight, multiplies=False)


def _linear(x: Tensor, weight: Tensor, *, multiplies: bool) -> Tensor:
    dtype = matmul_dtype(x, weight)
    ours = runs_native(x, weight) and dtype == torch.float32 and _beats_torch(dtype)
    if not (ours or emulates_bf16(x, dtype)):
        return F.linear(x, weight)  # which keeps its operands before it multiplies: checkpoints stop there
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = apply(_Linear, rows, weight, dtype, multiplies)
    return out.view(*x.shape[:-1], weight.shape[0])


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Multiply a (M, K) by b (K, N), of fp32, bf16 or one of each, without autograd.

    The result replaces `out` or is added to it. It is fp32, but that of two bf16 operands is bf16 where the hardware
    multiplies bf16.
    """
    both = torch.promote_types(a.dtype, b.dtype)
    if runs_native(a, b) and (emulates_bf16(a, both) or a.dtype != b.dtype or _beats_torch(both)):
        if out is None:
            out = torch.empty(a.shape[0], b.shape[1])
        assert out.dtype == torch.float32 and out.stride(1) == 1
        left, right = ((x, x.stride(0), x.stride(1), x.dtype == torch.bfloat16) for x in (a, b))
        if out.numel():
            call("gemm", a.shape[0], b.shape[1], a.shape[1], *left, *right, out, out.stride(0), add)
        return out
    if emulates_bf16(a, both) or a.dtype != b.dtype:
        a, b = a.float(), b.float()
    if out is None or not add:
        return torch.mm(a, b, out=out)
    return out.addmm_(a, b) if out.dtype == a.dtype else out.add_(torch.mm(a, b))


def _beats_torch(dtype: torch.dtype) -> bool:
    """Tell whether our own kernel multiplies faster than torch's library: docs/performance.md has the numbers."""
    return dtype == torch.float32 and (kernels_name() == "avx2" or not mkl_knows_this_cpu())


class _Linear(torch.autograd.Function):
    """Products by `product`: fp32, or bf16 with fp32 inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, multiplies: bool) -> Tensor:
        x = x.to(dtype)
        learns = getattr(ctx, "needs_input_grad", (False, False))[1]  # a frozen weight needs no x
        ctx.save_for_backward(x if learns else None, weight)
        ctx.dtype = dtype
        if not multiplies:
            return x.new_empty(x.shape[0], weight.shape[0])
        narrow_weight = weight.to(dtype)
        if dtype == torch.float32:
            return product(x, narrow_weight.t())
        out = x.new_empty(x.shape[0], weight.shape[0])
        for start in range(0, len(x), _CHUNK_ROWS):
            out[start : start + _CHUNK_ROWS] = product(x[start : start + _CHUNK_ROWS], narrow_weight.t())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        x_gradient = product(gradient, weight.to(ctx.dtype)) if needs_x else None
        weight_gradient = product(gradient.t(), x) if needs_weight else None
        return x_gradient, weight_gradient, None, None
