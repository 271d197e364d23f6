"""Causal attention with grouped heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.kernels.attention_gpu import Documents
from openelm.kernels.native import call, learns, runs_native
from openelm.kernels.precision import emulates_bf16, matmul_dtype

_LINE = 16  # components of a head are padded to multiples of it, as in cpp/attention.h


def attention(q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | Documents | None = None) -> Tensor:
    """Attend causally: q (B, Hq, T, hd), k and v (B, Hk, S, hd) -> (B, T, Hq*hd).

    The queries are the last T of the S positions; query head j reads key head j // (Hq/Hk). documents (B, S) holds
    the document of each position: a position sees only its own document. Follows torch.autocast.
    """
    if isinstance(documents, Documents):
        return documents.attend(q, k, v)
    dtype = matmul_dtype(q, k, v)
    if runs_native(q, k, v) and q.numel():
        documents = None if documents is None else _small_numbers(documents)
        q, k, v = (part if part.dtype == dtype else part.to(dtype) for part in (q, k, v))
        if learns(q, k, v):
            out: Tensor = _Attention.apply(q, k, v, documents)  # type: ignore[no-untyped-call]
            return out
        return _forward(q, k, v, documents, None)
    if q.shape[2] > 1 and emulates_bf16(q, dtype):  # the bf16 backward is ten times slower there; one token has none
        q, k, v = (part.to(dtype).float() for part in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            return _attention(q, k, v, documents).to(dtype)
    return _attention(q, k, v, documents)


class _Attention(torch.autograd.Function):
    """In C++, without a matrix of all scores; keeps two numbers a query beside inputs and output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        statistics = torch.empty(2, *q.shape[:3])
        out = _forward(q, k, v, documents, statistics)
        ctx.save_for_backward(q, k, v, documents, out, statistics)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, documents, out, statistics = ctx.saved_tensors
        rows, heads, length, head_dim = q.shape
        q_gradient = q.new_empty(rows, length, heads, head_dim)
        k_gradient, v_gradient = torch.zeros(2, *k.shape[:3], -(-head_dim // _LINE) * _LINE)
        sums = (statistics, gradient.contiguous(), q_gradient, k_gradient, v_gradient)
        call("attention_gradients", *_described(q, k, v), documents, out, *sums)
        k_gradient, v_gradient = (sums[..., :head_dim].to(k.dtype) for sums in (k_gradient, v_gradient))
        return q_gradient.transpose(1, 2), k_gradient, v_gradient, None


def _forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, statistics: Tensor | None) -> Tensor:
    rows, heads, length, head_dim = q.shape
    out = q.new_empty(rows, length, heads * head_dim)
    call("attention", *_described(q, k, v), documents, out, statistics)
    return out


def _described(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor | int]:
    """Return what `openelm_attention` wants to know of its inputs."""
    rows, heads, length, head_dim = q.shape
    described: list[Tensor | int] = [q.dtype == torch.bfloat16, rows, heads, k.shape[1], length, k.shape[2], head_dim]
    for part in (q, k, v):
        dense = part if part.stride(-1) == 1 else part.contiguous()
        described += dense, *dense.stride()[:3]
    return described


def _small_numbers(documents: Tensor) -> Tensor:
    """Return int32 numbers that are equal where these are."""
    if documents.dtype == torch.int64 and documents.numel():
        least, most = torch.aminmax(documents)
        if least < -(2**31) or most >= 2**31:
            documents = torch.unique(documents, return_inverse=True)[1]
    return documents.to(torch.int32).contiguous()


def _attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    rows, query_heads, length, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if documents is None and length == keys:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=query_heads != kv_heads)
        return out.transpose(1, 2).reshape(rows, length, query_heads * head_dim)
    # Query heads that share a key head become further queries of that head, so that keys are never repeated.
    groups = query_heads // kv_heads
    q = q.reshape(rows, kv_heads, groups * length, head_dim)
    mask = None
    if documents is not None or length > 1:
        mask = _visible(length, keys, documents, q.device).repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.reshape(rows, query_heads, length, head_dim)
    return out.transpose(1, 2).reshape(rows, length, query_heads * head_dim)


def _visible(length: int, keys: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Tell which keys each of the last `length` positions may read: (B or 1, 1, length, keys)."""
    positions = torch.arange(keys, device=device)
    visible = (positions <= positions[keys - length :, None])[None, None]
    if documents is None:
        return visible
    return visible & (documents[:, None, keys - length :, None] == documents[:, None, None, :])
