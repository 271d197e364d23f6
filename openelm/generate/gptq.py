"""GPTQ (arXiv 2210.17323): round a matrix so that its products, rather than its numbers, change least."""

from __future__ import annotations

import torch
from torch import Tensor

from openelm.errors import NumericError
from openelm.kernels.quantized import groups_of, pack
from openelm.model.quantized import Packed

DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, as published."""
_BLOCK = 128  # columns whose errors reach the columns behind them at once
_SHRUNKEN = torch.linspace(1.0, 0.5, 26).tolist()
_REFITS = 2


def searched(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Find each group's scale and bias of the least squared error: of ranges shrunken by up to a half, then refitted.

    Args:
        weight: (rows, columns).

    Returns:
        Scales and biases (rows, columns / group), in the dtype of the weight.
    """
    grouped = groups_of(weight, group).float()
    low, high = grouped.aminmax(dim=-1)
    least, scales, biases = torch.full_like(low, torch.inf), torch.ones_like(low), torch.zeros_like(low)

    def consider(scale: Tensor, bias: Tensor) -> None:
        scale, bias = (part.to(weight.dtype).float() for part in (scale, bias))
        scale = torch.where(scale == 0, 1.0, scale)
        numbers = _nearest(grouped, scale, bias, bits)
        error = (scale[..., None] * numbers + bias[..., None] - grouped).square().sum(-1)
        better = error < least
        for kept, new in ((least, error), (scales, scale), (biases, bias)):
            kept[better] = new[better]

    for shrunken in _SHRUNKEN:
        consider(shrunken * (high - low) / ((1 << bits) - 1), shrunken * low)
    for _ in range(_REFITS):  # the line of least squares through the numbers that were chosen
        numbers = _nearest(grouped, scales, biases, bits)
        apart = numbers - numbers.mean(-1, keepdim=True)
        spread = apart.square().sum(-1)
        scale = torch.where(spread > 0, (apart * grouped).sum(-1) / spread, scales)
        consider(scale, grouped.mean(-1) - scale * numbers.mean(-1))
    return scales.to(weight.dtype), biases.to(weight.dtype)


def rounded_to_searched(weight: Tensor, bits: int, group: int) -> Packed:
    """Round each number to the nearest one of its group's `searched` range."""
    scales, biases = searched(weight, bits, group)
    numbers = _nearest(groups_of(weight, group).float(), scales.float(), biases.float(), bits)
    return pack(numbers.flatten(-2), bits), scales, biases


def rounded_for_products(weight: Tensor, hessian: Tensor, bits: int, group: int, damping: float = DAMPING) -> Packed:
    """Round column after column, each time moving those that are left to make up for the error.

    Ranges are searched before, so that columns can be taken in the order of their weight in the products.

    Args:
        weight: (rows, columns).
        hessian: the sum of x xᵀ over the inputs x of the products, (columns, columns).
        damping: what the numbers themselves count beside the products, as a part of the Hessian's diagonal.

    Raises:
        NumericError: the inputs were not finite.
    """
    order, upper = _order(hessian, damping)
    scales, biases = searched(weight, bits, group)
    scale_of, bias_of = (part.float().T.contiguous() for part in (scales, biases))
    left = weight.float().T[order]  # columns lie together here
    numbers, columns = torch.empty_like(left), len(left)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty(end - start, left.shape[1])
        for column in range(start, end):
            place = int(order[column])
            scale, bias = scale_of[place // group], bias_of[place // group]
            number = ((left[column] - bias) / scale).round().clamp(0, (1 << bits) - 1)
            error = (left[column] - (scale * number + bias)) / upper[column, column]
            left[column:end].addr_(upper[column, column:end], error, alpha=-1)
            numbers[place], errors[column - start] = number, error
        left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return pack(numbers.T, bits), scales, biases


def _order(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the columns in the order in which they are rounded, and the Cholesky factor of the Hessian's inverse."""
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    if not torch.isfinite(diagonal).all():
        raise NumericError("the model's states are not finite on the calibration text", fix="the weights are damaged")
    order = diagonal.argsort(descending=True, stable=True)
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(damping * float(diagonal.mean()) or 1.0)  # any, where all inputs are zero
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def _nearest(grouped: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    return ((grouped - biases[..., None]) / scales[..., None]).round_().clamp_(0, (1 << bits) - 1)
