"""Causal attention with grouped heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.kernels.attention_gpu import Documents
from openelm.kernels.precision import emulates_bf16, matmul_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | Documents | None = None) -> Tensor:
    """Attend causally: q (B, Hq, T, hd), k and v (B, Hk, S, hd) -> (B, T, Hq*hd).

    The queries are the last T of the S positions; query head j reads key head j // (Hq/Hk). documents (B, S) holds
    the document of each position: a position sees only its own document. Follows torch.autocast.
    """
    if isinstance(documents, Documents):
        return documents.attend(q, k, v)
    dtype = matmul_dtype(q, k, v)
    if q.shape[2] > 1 and emulates_bf16(q, dtype):  # the bf16 backward is ten times slower there; one token has none
        q, k, v = (part.to(dtype).float() for part in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            return _attention(q, k, v, documents).to(dtype)
    return _attention(q, k, v, documents)


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
