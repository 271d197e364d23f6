"""Query and key normalisation with rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openelm.kernels.precision import runs_by_hand, wide_dtype
from openelm.kernels.rms_norm import inverse_rms, rms_norm

_CHUNK_BYTES = 1 << 20  # one stretch of rows and its steps in between stay in the cache


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into heads, normalise q and k, and rotate them to their positions.

    qkv (B, T, (Hq+2Hk)*hd), cos and sin (T, hd/2) -> q (B, Hq, T, hd), k and v (B, Hk, T, hd), all in qkv's dtype.
    Components (i, i + hd/2) turn together; norm and rotation are fp32 inside.
    """
    heads = qkv.reshape(*qkv.shape[:2], query_heads + 2 * kv_heads, -1)
    if runs_by_hand(qkv):
        q, k, v = _NormRope.apply(heads, q_weight, k_weight, cos, sin, query_heads, eps)  # type: ignore[no-untyped-call]
        return q, k, v
    q, k, v = torch.split(heads, [query_heads, kv_heads, kv_heads], dim=2)
    cos, sin = cos[:, None], sin[:, None]
    return _norm_rope(q, q_weight, cos, sin, eps), _norm_rope(k, k_weight, cos, sin, eps), v.transpose(1, 2)


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x (B, T, H, hd) -> (B, H, T, hd), in memory as it was: the order that attention on GPUs reads and writes."""
    first, second = rms_norm(x, weight, eps).to(wide_dtype(x.dtype)).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype).transpose(1, 2)


class _NormRope(torch.autograd.Function):
    """Heads (B, T, Hq+2Hk, hd) in; saves them and one number a head; few passes, in cache-sized stretches of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        query_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads = (heads.shape[2] - query_heads) // 2
        q_heads, k_heads, v_heads = torch.split(heads, [query_heads, kv_heads, kv_heads], dim=2)
        q_inverse, k_inverse = inverse_rms(q_heads, eps), inverse_rms(k_heads, eps)
        ctx.save_for_backward(heads, q_weight, k_weight, cos, sin, q_inverse, k_inverse)
        q = _normalise_and_turn(q_heads, q_inverse, q_weight, cos, sin)
        k = _normalise_and_turn(k_heads, k_inverse, k_weight, cos, sin)
        return q, k, v_heads.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        heads, q_weight, k_weight, cos, sin, q_inverse, k_inverse = ctx.saved_tensors
        q_gradient, k_gradient, v_gradient = (gradient.transpose(1, 2) for gradient in gradients)
        widths = [gradient.shape[2] for gradient in (q_gradient, k_gradient, v_gradient)]
        result = torch.empty(heads.shape, dtype=heads.dtype)
        q_heads, k_heads, _ = torch.split(heads, widths, dim=2)
        q_out, k_out, v_out = torch.split(result, widths, dim=2)
        q_weight_gradient = _turn_back(q_heads, q_inverse, q_weight, cos, sin, q_gradient, q_out)
        k_weight_gradient = _turn_back(k_heads, k_inverse, k_weight, cos, sin, k_gradient, k_out)
        v_out.copy_(v_gradient)
        return result, q_weight_gradient, k_weight_gradient, None, None, None, None


def _normalise_and_turn(x: Tensor, inverse: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, hd) -> (B, H, T, hd)."""
    rows, length, heads, head_dim = x.shape
    first_weight, second_weight = weight.to(inverse.dtype).chunk(2)
    cos, sin = cos[:, None], sin[:, None]
    first_cos, second_cos, first_sin, second_sin = (
        table * half for table in (cos, sin) for half in (first_weight, second_weight)
    )
    out = torch.empty(rows, heads, length, head_dim, dtype=x.dtype)
    chunk = _chunk_rows(x)
    for x_part, scale, out_part in zip(*(torch.split(tensor, chunk) for tensor in (x, inverse, out)), strict=True):
        normed = x_part * scale
        turned = torch.empty_like(normed)
        (first, second), (first_out, second_out) = normed.chunk(2, -1), turned.chunk(2, -1)
        torch.mul(first, first_cos, out=first_out).addcmul_(second, second_sin, value=-1)
        torch.mul(second, second_cos, out=second_out).addcmul_(first, first_sin)
        out_part.copy_(turned.transpose(1, 2))
    return out


def _turn_back(
    x: Tensor, inverse: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, gradient: Tensor, out: Tensor
) -> Tensor:
    """Write the gradient of x into `out`, both (B, T, H, hd), and return the gradient of the weight (hd,)."""
    head_dim = x.shape[-1]
    wide_weight = weight.to(inverse.dtype)
    weight_gradient = torch.zeros_like(wide_weight)
    cos, sin = cos[:, None], sin[:, None]
    chunk = _chunk_rows(x)
    parts = (torch.split(tensor, chunk) for tensor in (x, inverse, gradient, out))
    for x_part, scale, turned_part, out_part in zip(*parts, strict=True):
        normed = x_part * scale
        turned = turned_part.to(normed.dtype)
        back = torch.empty_like(normed)
        (first, second), (first_back, second_back) = turned.chunk(2, -1), back.chunk(2, -1)
        torch.mul(first, cos, out=first_back).addcmul_(second, sin)
        torch.mul(second, cos, out=second_back).addcmul_(first, sin, value=-1)
        products = normed * back
        weight_gradient += products.sum((0, 1, 2))
        # d x = scale · (g·w − x̂ · mean(x̂·g·w)), as in rms_norm
        mean = (products.view(-1, head_dim) @ wide_weight).div_(-head_dim).view(scale.shape)
        out_part.copy_(back.mul_(wide_weight).addcmul_(normed, mean).mul_(scale))
    return weight_gradient.to(weight.dtype)


def _chunk_rows(x: Tensor) -> int:
    """Return how many rows of the batch make one stretch."""
    row_numbers = x.shape[1:].numel()
    return max(1, _CHUNK_BYTES // (4 * row_numbers))
