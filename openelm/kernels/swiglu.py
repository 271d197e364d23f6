"""The gate of the feed-forward layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from openelm.kernels import native


def swiglu(gate_up: Tensor) -> Tensor:
    """Gate one half by the other: gate_up (..., 2f) -> silu(gate) * up (..., f)."""
    if native.runs_native(gate_up):
        out: Tensor = native.apply(_SwiGLU, gate_up.contiguous())
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Saves only its input; silu(gate) is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        rows, dim = gate_up.shape[:-1].numel(), gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], dim)
        native.call("swiglu", rows, dim, gate_up, out, gate_up.dtype == torch.bfloat16)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        rows, dim = gate_up.shape[:-1].numel(), gate_up.shape[-1] // 2
        result = torch.empty_like(gate_up)
        operands = (gate_up, gradient.contiguous(), result, gate_up.dtype == torch.bfloat16)
        native.call("swiglu_backward", rows, dim, *operands)
        return result
