"""Attention on CUDA within packed documents, which must not cost more than attention without them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from openelm.kernels.transfer import send

Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
_FEWEST = 64  # documents: a batch with fewer is padded, so that compiled code meets few different sizes


@dataclass(frozen=True)
class Documents:
    """Where the documents of packed rows begin: made once a batch, used by every layer.

    Args:
        starts: int32 (n + 1,), the first position of each document in the B·T positions, then B·T, repeated so that
            n is a power of two.
        length: T, at least that of the longest document.
        kernel: what attends within sequences, see `flash_varlen`.
    """

    starts: Tensor
    length: int
    kernel: Kernel

    @classmethod
    def of(cls, ids: Tensor, kernel: Kernel) -> Documents:
        """Find the documents of rows: ids (B, T), alike where neighbours are of one document.

        It waits for the device that holds `ids`; a training loop has them on the host.
        """
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        found = first.flatten().nonzero().squeeze(1)
        count = max(_FEWEST, 1 << (len(found) - 1).bit_length())
        starts = torch.full((count + 1,), ids.numel(), dtype=torch.int32, device=ids.device)
        starts[: len(found)] = found
        return cls(starts, ids.shape[1], kernel)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend causally within documents: q (B, Hq, T, hd), k and v (B, Hk, T, hd) -> (B, T, Hq*hd), in 16 bits."""
        rows, query_heads, length, head_dim = q.shape
        q, k, v = (part.transpose(1, 2).reshape(rows * length, -1, head_dim) for part in (q, k, v))
        out = self.kernel(q, k, v, self.starts, self.length)
        return out.reshape(rows, length, query_heads * head_dim)


@functools.cache
def flash_varlen() -> Kernel | None:
    """Return FlashAttention for sequences of different lengths; None where this PyTorch has none (before 2.11).

    It takes q, k and v (positions, heads, hd), the starts of the sequences, and a bound of their lengths.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        return None
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in known:  # before 2.12 it need not be said
        options["enable_gqa"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
        out = varlen_attn(q, k, v, starts, starts, longest, longest, **options)
        assert isinstance(out, Tensor)
        return out

    return attend


def visible_documents(documents: Tensor | Documents, dtype: torch.dtype, device: torch.device) -> Tensor | Documents:
    """Prepare documents (B, T) for all layers, whose queries are of a dtype, and send them to their device."""
    if isinstance(documents, Documents):
        return documents
    kernel = flash_varlen() if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) else None
    if kernel is None:
        return send(documents, device)
    found = Documents.of(documents, kernel)
    return replace(found, starts=send(found.starts, device))
