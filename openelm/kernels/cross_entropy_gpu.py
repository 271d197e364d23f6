"""The loss of `cross_entropy` on CUDA: logits are read twice and written once, in their own 16 bits.

Inductor would keep the wide logits that the gradient needs in memory; here one kernel takes a row's logsumexp and puts
the row's gradient where the logits were.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 768 << 20
"""Logits held at once; a large product is faster, and beyond 8,000 rows little."""
_COLUMNS = 4096


@functools.cache
def available() -> bool:
    """Tell whether Triton is installed, with which PyTorch for CUDA comes on Linux."""
    return importlib.util.find_spec("triton") is not None


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    dtype: torch.dtype,
    needs: tuple[bool, bool],
    frozen_columns: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return loss_sum, nll_sum and the gradients of loss_sum that are needed; rows without a target count nothing.

    Nothing waits for the device: the rows with a target, whose number the host does not know, are not put together.
    The weight's gradient is that of the columns which are not frozen.
    """
    h, w = hidden.to(dtype), weight.to(dtype)
    chunk_rows = max(1, min(len(h), CHUNK_BYTES // (len(w) * w.itemsize)))
    products = h.new_empty(chunk_rows, len(w))
    losses = h.new_empty(2, len(h), dtype=torch.float32)
    hidden_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    learned = weight[:, frozen_columns:]
    weight_gradient = torch.zeros(learned.shape, dtype=torch.float32, device=weight.device) if needs[1] else None
    for start in range(0, len(h), chunk_rows):
        part = slice(start, min(start + chunk_rows, len(h)))
        logits = products[: part.stop - start]
        torch.mm(h[part], w.t(), out=logits)
        logits_to_gradients(logits, targets[part], losses[0, part], losses[1, part], z_loss, write=any(needs))
        if hidden_gradient is not None:
            hidden_gradient[part] = torch.mm(logits, w)
        if weight_gradient is not None:
            weight_gradient += torch.mm(logits.t(), h[part, frozen_columns:])
    nll_sum = losses[0].sum()
    if weight_gradient is not None:
        weight_gradient = weight_gradient.to(weight.dtype)
    return nll_sum + z_loss * losses[1].square().sum(), nll_sum, hidden_gradient, weight_gradient


def logits_to_gradients(
    logits: Tensor, targets: Tensor, losses: Tensor, log_sums: Tensor, z_loss: float, *, write: bool
) -> None:
    """Take the loss of each row of logits (N, V), and put its gradient where the logits were.

    targets (N,), -100: none, the row's gradient, loss and logsumexp are then zero. losses and log_sums (N,) fp32 are
    written; with z = z_loss and l = logsumexp, the gradient is softmax · (1 + 2·z·l) − onehot.
    """
    rows, columns = logits.shape
    _kernel()[(rows,)](
        logits,
        targets,
        losses,
        log_sums,
        z_loss,
        columns,
        logits.stride(0),
        COLUMNS=_COLUMNS,
        WRITE=write,
        num_warps=8,
    )


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]
        logits, targets, losses, log_sums, z_loss, columns, stride, COLUMNS: tl.constexpr, WRITE: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        logits += row * stride
        places = tl.arange(0, COLUMNS)
        largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, columns, COLUMNS):
            inside = start + places < columns
            x = tl.load(logits + start + places, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(largest, x)
            # a lane that has seen nothing yet holds -inf, whose difference with itself is no number
            total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(largest - higher) + tl.exp(x - higher))
            largest = higher
        top = tl.max(largest, 0)
        log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
        learns = target >= 0
        at_target = tl.load(logits + tl.where(learns, target, 0)).to(tl.float32)
        tl.store(losses + row, tl.where(learns, log_sum - at_target, 0.0))
        tl.store(log_sums + row, tl.where(learns, log_sum, 0.0))
        if WRITE:
            scale = tl.where(learns, 1 + 2 * z_loss * log_sum, 0.0)
            for start in range(0, columns, COLUMNS):
                inside = start + places < columns
                x = tl.load(logits + start + places, mask=inside, other=float("-inf")).to(tl.float32)
                gradient = scale * tl.exp(x - log_sum) - tl.where(start + places == target, 1.0, 0.0)
                tl.store(logits + start + places, gradient.to(logits.dtype.element_ty), mask=inside)

    return kernel
