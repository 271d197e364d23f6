"""Root-mean-square normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from openelm.kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise the last axis: x (..., d), weight (d,) -> (..., d) in the promoted dtype of x and weight.

    The normalised x is rounded to x's dtype before it meets the weight, as in the released models. With `dtype` the
    result is the one that a cast after the norm would give.
    """
    dtype = dtype or torch.promote_types(x.dtype, weight.dtype)
    if native.runs_native(x, weight) and dtype in (torch.float32, torch.bfloat16):
        out: Tensor = native.apply(_RMSNorm, x.contiguous(), weight.contiguous(), eps, dtype)
        return out
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps).to(dtype)
    return (F.rms_norm(x, weight.shape, None, eps) * weight).to(dtype)


class _RMSNorm(torch.autograd.Function):
    """Saves its operands; what is made of them again costs nothing beside reading them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out = torch.empty(x.shape, dtype=dtype)
        native.call("rms_norm", *_sizes(x), eps, *_typed(x), *_typed(weight), *_typed(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_gradient, weight_gradient = torch.empty_like(x), torch.empty(weight.shape)
        operands = (*_typed(x), *_typed(weight), *_typed(gradient.contiguous()))
        native.call("rms_norm_backward", *_sizes(x), ctx.eps, *operands, x_gradient, weight_gradient)
        return x_gradient, weight_gradient.to(weight.dtype), None, None


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.shape[:-1].numel(), x.shape[-1]


def _typed(tensor: Tensor) -> tuple[Tensor, bool]:
    return tensor, tensor.dtype == torch.bfloat16
