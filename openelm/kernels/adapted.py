"""Products with a frozen matrix and a change of low rank that learns: LoRA (arXiv 2106.09685), DoRA (2402.09353).

W (out, in) is frozen; A (r, in) and B (out, r) learn; d is x, some numbers of it dropped; s is a scale:

    LoRA    y = x Wᵀ + s · d Aᵀ Bᵀ
    DoRA    y = x Wᵀ + (g − 1) · d Wᵀ + g · s · d Aᵀ Bᵀ    with g = m / |W + s B A| by rows; m (out,) learns

as peft computes them. The backward pass takes no gradient of W, nor of the norm (section 4.3 of DoRA's paper). It needs
x, and which numbers were dropped; all else is computed again, which costs less than to keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openelm.kernels.linear import linear, product
from openelm.kernels.native import apply
from openelm.kernels.precision import matmul_dtype, wide_dtype

Matrix = Callable[[], Tensor]
"""Gives W, which may lie where the next matrix will."""


def adapted_linear(
    x: Tensor,
    matrix: Matrix,
    down: Tensor,
    up: Tensor,
    scale: float,
    magnitude: Tensor | None = None,
    *,
    dropout: float = 0.0,
    multiplies: bool = True,
) -> Tensor:
    """Multiply rows by an adapted matrix: x (..., in), down (r, in), up (out, r) -> (..., out).

    Follows torch.autocast; without it the adapter's own products have the wider dtype of x and the adapter.

    Args:
        magnitude: (out,), for DoRA.
        dropout: which part of x the adapter does not see, drawn from torch's global generator.
        multiplies: whether the result is wanted, or only what the backward pass needs, as of `keep_operands`.
    """
    rows = x.reshape(-1, x.shape[-1])
    kept, kept_scale = draw_kept(rows, dropout) if dropout else (None, 1.0)
    options = _Options(matrix, scale * kept_scale, kept_scale, matmul_dtype(x, down), multiplies)
    out: Tensor = apply(_AdaptedLinear, rows, kept, down, up, magnitude, options)
    return out.view(*x.shape[:-1], len(up))


def draw_kept(x: Tensor, dropout: float) -> tuple[Tensor, float]:
    """Draw which numbers of x are kept, and return by what those are multiplied.

    A number costs 16 random bits, a fifth of the time that torch's own dropout takes on a CPU: the part that is
    dropped is a multiple of 2^-16.
    """
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    parts = round(dropout * 2**16)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= parts - 2**15
    return kept, 2**16 / (2**16 - parts)


def row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return |W + s B A| by rows, (out,), in fp32 at least."""
    wide = torch.promote_types(weight.dtype, down.dtype)
    norms: Tensor = torch.linalg.vector_norm(
        torch.addmm(weight.to(wide), up.to(wide), down.to(wide), alpha=scale), dim=1
    )
    return norms


@dataclass(frozen=True)
class _Options:
    matrix: Matrix
    scale: float  # of the adapter, and for what was dropped
    kept_scale: float  # for what was dropped
    dtype: torch.dtype  # of the adapter's products
    multiplies: bool


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        down: Tensor,
        up: Tensor,
        magnitude: Tensor | None,
        options: _Options,
    ) -> Tensor:
        ctx.save_for_backward(x, kept, down, up, magnitude)
        ctx.options = options
        if not options.multiplies:
            return x.new_empty(len(x), len(up))
        weight, seen = options.matrix(), _seen(x, kept)
        out = linear(x, weight)
        low = product(seen.to(options.dtype), down.to(options.dtype).t()).mul_(options.scale)
        if magnitude is None:
            return _add_product(out, low, up, options.dtype)
        factor = magnitude / row_norms(weight, down, up, options.scale / options.kept_scale)
        if kept is None:
            return (_add_product(out, low, up, options.dtype) * factor).to(out.dtype)
        dropped = linear(seen, weight) * ((factor - 1) * options.kept_scale)
        change = product(low.to(options.dtype), up.to(options.dtype).t()) * factor
        return (out + dropped + change).to(out.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, kept, down, up, magnitude = ctx.saved_tensors
        options, needs_x = ctx.options, ctx.needs_input_grad[0]
        seen, dtype = _seen(x, kept).to(options.dtype), options.dtype
        low = product(seen, down.to(dtype).t()).mul_(options.scale).to(dtype)
        magnitude_gradient = factor = None
        if magnitude is not None:
            norms = row_norms(options.matrix(), down, up, options.scale / options.kept_scale)
            factor = magnitude / norms
            adapted = product(seen.to(gradient.dtype), options.matrix().to(gradient.dtype).t()).mul_(options.kept_scale)
            adapted = _add_product(adapted, low, up, dtype)
            magnitude_gradient = (gradient * adapted).sum(0, dtype=norms.dtype) / norms
            del adapted
        scaled = gradient.to(dtype) if factor is None else (gradient * factor).to(dtype)
        back = product(scaled, up.to(dtype)).mul_(options.scale).to(dtype)
        down_gradient, up_gradient = product(back.t(), seen), product(scaled.t(), low)
        x_gradient = _x_gradient(gradient, kept, back, down, factor, options) if needs_x else None
        return x_gradient, None, down_gradient, up_gradient, magnitude_gradient, None


def _x_gradient(
    gradient: Tensor, kept: Tensor | None, back: Tensor, down: Tensor, factor: Tensor | None, options: _Options
) -> Tensor:
    """Return the gradient of x; `back` (N, r) is that of d Aᵀ."""
    weight, narrow_down = options.matrix().to(gradient.dtype), down.to(options.dtype)
    if kept is None:
        through = gradient if factor is None else (gradient * factor).to(gradient.dtype)
        return _add_product(product(through, weight), back, narrow_down.t(), options.dtype)
    change = product(back, narrow_down)
    if factor is not None:
        dropped = (gradient * ((factor - 1) * options.kept_scale)).to(gradient.dtype)
        change += product(dropped, weight)
    return product(gradient, weight).add_(change.mul_(kept))


def _seen(x: Tensor, kept: Tensor | None) -> Tensor:
    """Drop numbers, without making up for them: that is a part of the scale."""
    return x if kept is None else x * kept


def _add_product(out: Tensor, low: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """Add low (N, r) times up (out, r) to `out` (N, out), in place."""
    low, up = low.to(dtype), up.to(dtype).t()
    if out.dtype == wide_dtype(dtype):
        return product(low, up, out=out, add=True)
    return out.add_(product(low, up))
