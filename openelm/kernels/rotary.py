"""Query and key normalisation with rotary positions."""

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
    Components (i, i + hd/2) turn together. Norm and rotation are fp32 inside.
    """
    heads = qkv.reshape(*qkv.shape[:2], query_heads + 2 * kv_heads, len(q_weight))
    if native.runs_native(qkv, q_weight, k_weight) and q_weight.dtype == k_weight.dtype:
        tables = (table.float().contiguous() for table in (cos, sin))
        operands = (heads.contiguous(), q_weight.contiguous(), k_weight.contiguous(), *tables)
        q, k, v = native.apply(_NormRope, *operands, query_heads, eps)
        return q, k, v
    q, k, v = torch.split(heads, [query_heads, kv_heads, kv_heads], dim=2)
    cos, sin = cos[:, None], sin[:, None]
    return _norm_rope(q, q_weight, cos, sin, eps), _norm_rope(k, k_weight, cos, sin, eps), v.transpose(1, 2)


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x (B, T, H, hd) -> (B, H, T, hd), in memory as it was: the order that attention on GPUs reads and writes."""
    first, second = rms_norm(x.to(wide_dtype(x.dtype)), weight, eps).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype).transpose(1, 2)


class _NormRope(torch.autograd.Function):
    """Heads (B, T, Hq+2Hk, hd) in; saves them and nothing that is made of them."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, *others: Any) -> tuple[Tensor, ...]:
        *operands, query_heads, eps = heads, *others
        rows, length, all_heads, head_dim = heads.shape
        kv_heads = (all_heads - query_heads) // 2
        ctx.save_for_backward(*operands)
        ctx.sizes = rows, length, query_heads, kv_heads, head_dim, eps
        split = [heads.new_empty(rows, count, length, head_dim) for count in (query_heads, kv_heads, kv_heads)]
        native.call("qk_norm_rope", *ctx.sizes, *_arguments(operands, split))
        return tuple(split)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        parts = [part if part.stride(3) == 1 else part.contiguous() for part in gradients]
        result = torch.empty_like(operands[0])
        weight_gradients = torch.empty(2, ctx.sizes[4])
        native.call("qk_norm_rope_backward", *ctx.sizes, *_arguments(operands, parts), result, weight_gradients)
        return result, *weight_gradients.to(operands[1].dtype), None, None, None, None


def _arguments(operands: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor | int]:
    """Lay out heads, weights and tables, then q, k and v (or their gradients), for the two C++ functions."""
    heads, q_weight, *_ = operands
    arguments: list[Tensor | int] = [heads.dtype == torch.bfloat16, q_weight.dtype == torch.bfloat16, *operands]
    for part in parts:
        arguments += [part, *part.stride()[:3]]
    return arguments
