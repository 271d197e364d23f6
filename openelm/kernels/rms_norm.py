"""Root-mean-square normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.kernels.precision import runs_by_hand, wide_dtype

_CHUNK_BYTES = 1 << 19  # what one core's cache holds beside the operands


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis: x (..., d), weight (d,) -> (..., d) in the promoted dtype of x and weight.

    The normalised x is rounded to x's dtype before it meets the weight, as in the released models.
    """
    if runs_by_hand(x):
        out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, weight.shape, None, eps) * weight


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x²) + eps) over the last axis, kept as an axis of one, in the wide dtype."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x.dtype))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number a row; the backward works on cache-sized stretches of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        if x.dtype == inverse.dtype == weight.dtype:
            return torch.mul(x, inverse).mul_(weight)
        return (x * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        dim, wide = x.shape[-1], inverse.dtype
        x_gradient = torch.empty(x.shape, dtype=x.dtype)
        weight_gradient = torch.zeros(dim, dtype=wide)
        rows = max(1, _CHUNK_BYTES // (dim * wide.itemsize))
        flat = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, gradients[0], inverse, x_gradient))
        parts = (torch.split(tensor, rows) for tensor in flat)
        wide_weight = weight.to(wide)
        for x_part, gradient, scale, out in zip(*parts, strict=True):
            normed = x_part * scale
            products = normed * gradient
            weight_gradient += products.sum(0)
            # d x = scale · (g·w − x̂ · mean(x̂·g·w))
            mean = torch.mv(products, wide_weight).div_(-dim).unsqueeze(1)
            torch.mul(gradient, wide_weight, out=products)
            out.copy_(products.addcmul_(normed, mean).mul_(scale))
        return x_gradient, weight_gradient.to(weight.dtype), None
