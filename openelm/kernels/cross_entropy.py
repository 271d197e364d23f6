"""The loss on top of the tied output matrix, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openelm.kernels import cross_entropy_gpu
from openelm.kernels.linear import linear, product
from openelm.kernels.native import call, runs_native
from openelm.kernels.precision import emulates_bf16, matmul_dtype, wide_dtype

# Bytes of wide logits held at once. More rows mean fewer passes over the weight and its gradient, which fp32 products
# hardly notice (3.3 s at 32 MiB, 3.1 s at 64 and at 128); bf16 units do (2.0 s at 32 MiB, 1.3 s at 128 MiB).
_CHUNK_BYTES = {"fp32": 64 << 20, "bf16": 128 << 20, "gpu": 512 << 20}


@dataclass(frozen=True)
class AdaptedHead:
    """An output matrix W + s · C R of which W (V, d) is frozen, and C (V, r) and R (r, d) learn."""

    weight: Tensor
    columns: Tensor
    rows: Tensor
    scale: float


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | AdaptedHead, targets: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum the next-token losses: hidden (N, d), weight (V, d), targets (N,) with -100 = no target.

    Returns loss_sum = Σ nll + z_loss · logsumexp², differentiable, and nll_sum, detached; both cover the rows with
    a target only. Follows torch.autocast. The gradients are computed with the loss, chunk by chunk (Cut
    Cross-Entropy, arXiv 2411.09009, names the idea; here the chunks are rows and nothing is dropped).

    Raises:
        IndexError: a target is outside the vocabulary; Triton's kernel, on CUDA, does not look for it.
    """
    columns = None
    if isinstance(weight, AdaptedHead):
        hidden, columns, weight = _beside(hidden, weight), weight.columns, weight.weight
    dtype = matmul_dtype(hidden, weight)
    if not _on_gpu(hidden, dtype):
        kept = (targets != -100).nonzero().squeeze(1)
        if len(kept) < len(targets):
            hidden, targets = hidden.index_select(0, kept), targets.index_select(0, kept)
        targets = _checked(targets, len(weight))
    learning = torch.is_grad_enabled()
    loss_sum, nll_sum = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, columns, targets, z_loss, dtype, learning
    )
    return loss_sum, nll_sum


def linear_log_likelihoods(hidden: Tensor, weight: Tensor | AdaptedHead, targets: Tensor) -> Tensor:
    """Return the log-likelihood in nats of each target (N,), differentiable: hidden (N, d), weight (V, d).

    Follows torch.autocast. The logits are computed once more in the backward pass, chunk by chunk, so that none are
    kept; where a sum is all that is asked for, `linear_cross_entropy` needs one product less.

    Raises:
        IndexError: a target is outside the vocabulary.
    """
    columns = None
    if isinstance(weight, AdaptedHead):
        hidden, columns, weight = _beside(hidden, weight), weight.columns, weight.weight
    dtype = matmul_dtype(hidden, weight)
    values: Tensor = _LogLikelihoods.apply(  # type: ignore[no-untyped-call]
        hidden, weight, columns, _checked(targets, len(weight)), dtype
    )
    return values


def _beside(hidden: Tensor, head: AdaptedHead) -> Tensor:
    """Return [h, s · h Rᵀ], which times [W, C]ᵀ is what h gives: so W takes no gradient, which would cost as much."""
    dtype = matmul_dtype(hidden, head.weight)
    low = linear(hidden, head.rows.to(hidden.dtype)) * head.scale
    return torch.cat([hidden.to(dtype), low.to(dtype)], dim=1)


def _checked(targets: Tensor, vocabulary: int) -> Tensor:
    """Return targets as the kernels read them: int64 without gaps, each in the vocabulary."""
    if targets.numel():
        least, most = (int(bound) for bound in torch.aminmax(targets))
        if least < 0 or most >= vocabulary:
            raise IndexError(f"target {least if least < 0 else most} is not in the vocabulary of {vocabulary} tokens")
    return targets.long().contiguous()


def _on_gpu(hidden: Tensor, dtype: torch.dtype) -> bool:
    return hidden.is_cuda and dtype != torch.float64 and cross_entropy_gpu.available()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        columns: Tensor | None,
        targets: Tensor,
        z_loss: float,
        dtype: torch.dtype,
        learning: bool,
    ) -> tuple[Tensor, Tensor]:
        learned = 1 if columns is None else 2
        needs = (learning and ctx.needs_input_grad[0], learning and ctx.needs_input_grad[learned])
        ctx.save_for_backward(hidden, weight, columns, targets)
        ctx.options, ctx.learned = (z_loss, dtype, needs), learned
        parts = hidden, weight, columns, targets
        with torch.autocast(hidden.device.type, enabled=False):
            loss_sum, nll_sum, *ctx.gradients = _loss_and_gradients(*parts, z_loss, dtype, needs)
        ctx.mark_non_differentiable(nll_sum)
        return loss_sum, nll_sum

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The buffers are handed on and scaled in place; a second backward of a kept graph computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            with torch.autocast(upstream[0].device.type, enabled=False):
                gradients = _loss_and_gradients(*ctx.saved_tensors, *ctx.options)[2:]
        of_hidden, learned = (None if gradient is None else gradient.mul_(upstream[0]) for gradient in gradients)
        of_weight, of_columns = (learned, None) if ctx.learned == 1 else (None, learned)
        return of_hidden, of_weight, of_columns, None, None, None, None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor | None,
    targets: Tensor,
    z_loss: float,
    dtype: torch.dtype,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return loss_sum, nll_sum and the gradients of loss_sum that are needed; every row has a target.

    With p = softmax of a row of logits, l its logsumexp and s = 1 + 2·z_loss·l, the gradient of the row's logits is
    s·p − onehot = s·(p − onehot/s): p is kept where the logits were, and s scales the row's hidden vector instead.
    Where the weight is followed by columns that learn, the second gradient is theirs.
    """
    h, w = hidden.to(dtype), _whole(weight, columns, dtype)
    learned, frozen_columns = (weight, 0) if columns is None else (columns, weight.shape[1])
    if _on_gpu(hidden, dtype):
        return cross_entropy_gpu.loss_and_gradients(hidden, w, targets, z_loss, dtype, needs, frozen_columns)
    wide = wide_dtype(dtype)
    nll, log_sums, scales = h.new_empty(3, len(h), dtype=wide)
    hidden_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    weight_gradient = torch.zeros(learned.shape, dtype=wide, device=weight.device) if needs[1] else None
    for part, logits in _logit_chunks(h, w):
        softmax_loss(logits, targets[part], z_loss, nll[part], log_sums[part], scales[part], gradients=any(needs))
        scale = scales[part, None]
        if hidden_gradient is not None:
            hidden_gradient[part] = product(logits, w).mul_(scale)
        if weight_gradient is not None:
            scaled = (h[part, frozen_columns:] * scale).to(logits.dtype)
            product(logits.t(), scaled, out=weight_gradient, add=True)
    nll_sum = nll.sum()
    if weight_gradient is not None:
        weight_gradient = weight_gradient.to(learned.dtype)
    return nll_sum + z_loss * log_sums.square().sum(), nll_sum, hidden_gradient, weight_gradient


class _LogLikelihoods(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, columns: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, columns, targets)
        ctx.dtype = dtype
        losses, log_sums, scales = hidden.new_empty(3, len(hidden), dtype=wide_dtype(dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            for part, logits in _logit_chunks(hidden.to(dtype), _whole(weight, columns, dtype)):
                softmax_loss(logits, targets[part], 0.0, losses[part], log_sums[part], scales[part], gradients=False)
        found: Tensor = losses.neg_()
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, targets = ctx.saved_tensors
        learned, frozen_columns = (weight, 0) if columns is None else (columns, weight.shape[1])
        needs_hidden, needs_learned = ctx.needs_input_grad[0], ctx.needs_input_grad[1 if columns is None else 2]
        wide = wide_dtype(ctx.dtype)
        of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
        of_learned = torch.zeros(learned.shape, dtype=wide, device=weight.device) if needs_learned else None
        losses, log_sums, scales = hidden.new_empty(3, len(hidden), dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(ctx.dtype), _whole(weight, columns, ctx.dtype)
            for part, logits in _logit_chunks(h, w):
                softmax_loss(logits, targets[part], 0.0, losses[part], log_sums[part], scales[part], gradients=True)
                shares = -upstream[0][part, None]
                if of_hidden is not None:
                    of_hidden[part] = product(logits, w).mul_(shares)
                if of_learned is not None:
                    scaled = (h[part, frozen_columns:] * shares).to(logits.dtype)
                    product(logits.t(), scaled, out=of_learned, add=True)
        of_learned = None if of_learned is None else of_learned.to(learned.dtype)
        of_weight, of_columns = (of_learned, None) if columns is None else (None, of_learned)
        return of_hidden, of_weight, of_columns, None, None


def _whole(weight: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Put a weight and the columns that follow it together."""
    return weight.to(dtype) if columns is None else torch.cat([weight.to(dtype), columns.to(dtype)], 1)


def _logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield stretches of rows and their logits, in memory that the next stretch takes over."""
    dtype = hidden.dtype
    wide = wide_dtype(dtype)
    narrow = dtype == torch.bfloat16 and not emulates_bf16(hidden, dtype)  # whether products come out in bf16
    kind = "gpu" if hidden.device.type != "cpu" else "bf16" if narrow else "fp32"
    rows = max(1, min(len(hidden), _CHUNK_BYTES[kind] // (len(weight) * wide.itemsize)))
    products = hidden.new_empty(rows, len(weight), dtype=dtype if narrow else wide)
    for start in range(0, len(hidden), rows):
        part = slice(start, min(start + rows, len(hidden)))
        logits = products[: part.stop - start]
        product(hidden[part], weight.t(), out=logits)
        yield part, logits


def softmax_loss(
    logits: Tensor,
    targets: Tensor,
    z_loss: float,
    nll: Tensor,
    log_sums: Tensor,
    scales: Tensor,
    *,
    gradients: bool,
) -> None:
    """Fill nll, l = logsumexp and s = 1 + 2·z_loss·l, each (N,), for contiguous logits (N, V); with gradients the
    logits become softmax − onehot / s."""
    if runs_native(logits, nll):
        rows, columns = logits.shape
        is_bf16 = logits.dtype == torch.bfloat16
        call("softmax_loss", rows, columns, logits, is_bf16, targets, float(z_loss), nll, log_sums, scales, gradients)
        return
    wide = logits.to(nll.dtype)
    column = targets[:, None]
    torch.logsumexp(wide, 1, out=log_sums)
    torch.sub(log_sums, wide.gather(1, column)[:, 0], out=nll)
    torch.add(1, log_sums, alpha=2 * z_loss, out=scales)
    if gradients:
        wide.sub_(log_sums[:, None]).exp_().scatter_add_(1, column, -1 / scales[:, None])
        if wide is not logits:
            logits.copy_(wide)
