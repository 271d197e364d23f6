"""The gate of the feed-forward layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openelm.kernels.precision import runs_by_hand

_CHUNK_ROWS = 128


def swiglu(gate_up: Tensor) -> Tensor:
    """Gate one half by the other: gate_up (..., 2f) -> silu(gate) * up (..., f)."""
    if runs_by_hand(gate_up):
        out: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Saves only its input; silu(gate) is computed again in the backward, in a small buffer."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        result = torch.empty(gate_up.shape, dtype=gate_up.dtype)
        flat = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (gate_up, gradients[0], result))
        parts = (torch.split(tensor, _CHUNK_ROWS) for tensor in flat)
        for both, gradient, out in zip(*parts, strict=True):
            gate, up = both.chunk(2, dim=-1)
            gate_gradient, up_gradient = out.chunk(2, dim=-1)
            torch.mul(F.silu(gate), gradient, out=up_gradient)
            torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient)
        return result
