"""Rotary positions of queries and keys, which may be normalised before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from openelm.kernels import native
from openelm.kernels.precision import wide_dtype
from openelm.kernels.rms_norm import rms_norm


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_heads: int,
    kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into heads, normalise q and k where they have weights, and rotate them.

    qkv (B, T, (Hq+2Hk)*hd), cos and sin (T, hd/2) -> q (B, Hq, T, hd), k and v (B, Hk, T, hd), all in qkv's dtype.
    Components (i, i + hd/2) turn together. Norm and rotation are fp32 inside. Both weights are None, or neither is.
    """
    heads = qkv.reshape(*qkv.shape[:2], query_heads + 2 * kv_heads, 2 * cos.shape[-1])
    weights = [weight.contiguous() for weight in (q_weight, k_weight) if weight is not None]
    if native.runs_native(qkv, *weights) and len({weight.dtype for weight in weights}) <= 1:
        tables = (table.float().contiguous() for table in (cos, sin))
        operands = (heads.contiguous(), *(weights or (None, None)), *tables)
        q, k, v = native.apply(_NormRope, *operands, query_heads, eps)
        return q, k, v
    q, k, v = torch.split(heads, [query_heads, kv_heads, kv_heads], dim=2)
    cos, sin = cos[:, None], sin[:, None]
    return _norm_rope(q, q_weight, cos, sin, eps), _norm_rope(k, k_weight, cos, sin, eps), v.transpose(1, 2)


def _norm_rope(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x (B, T, H, hd) -> (B, H, T, hd), in memory as it was: the order that attention on GPUs reads and writes."""
    wide = x.to(wide_dtype(x.dtype))
    first, second = (wide if weight is None else rms_norm(wide, weight, eps)).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype).transpose(1, 2)


class _NormRope(torch.autograd.Function):
    """Heads (B, T, Hq+2Hk, hd) in; saves them where they are normalised, and nothing that is made of them."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, *others: Any) -> tuple[Tensor, ...]:
        *operands, query_heads, eps = heads, *others
        rows, length, all_heads, head_dim = heads.shape
        kv_heads = (all_heads - query_heads) // 2
        is_normalised = operands[1] is not None
        ctx.save_for_backward(heads if is_normalised else None, *operands[1:])
        ctx.sizes = rows, length, query_heads, kv_heads, head_dim, eps
        split = [heads.new_empty(rows, count, length, head_dim) for count in (query_heads, kv_heads, kv_heads)]
        native.call("qk_norm_rope", *ctx.sizes, *_arguments(heads.dtype, operands, split))
        return tuple(split)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        parts = [part if part.stride(3) == 1 else part.contiguous() for part in gradients]
        rows, length, query_heads, kv_heads, head_dim, _ = ctx.sizes
        result = parts[0].new_empty(rows, length, query_heads + 2 * kv_heads, head_dim)
        of_weights = torch.empty(2, head_dim)
        arguments = _arguments(result.dtype, operands, parts)
        native.call("qk_norm_rope_backward", *ctx.sizes, *arguments, result, of_weights)
        if (q_weight := operands[1]) is None:
            return (result, *(None,) * 6)
        return result, *of_weights.to(q_weight.dtype), None, None, None, None


def _arguments(
    dtype: torch.dtype, operands: Sequence[Tensor | None], parts: Sequence[Tensor]
) -> list[Tensor | int | None]:
    """Lay out heads, weights and tables, then q, k and v (or their gradients), for the two C++ functions."""
    q_weight = operands[1]
    narrow_weights = q_weight is not None and q_weight.dtype == torch.bfloat16
    arguments: list[Tensor | int | None] = [dtype == torch.bfloat16, narrow_weights, *operands]
    for part in parts:
        arguments += [part, *part.stride()[:3]]
    return arguments
