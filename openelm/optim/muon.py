"""Muon: momentum whose matrices are made nearly orthogonal (Keller Jordan, https://kellerjordan.github.io/posts/muon/).

The update of a matrix (n, m) is scaled by 0.2 · sqrt(max(n, m)), which gives it the root mean square that AdamW's
updates have, so that AdamW's learning rate and weight decay carry over (arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openelm.kernels.precision import cpu_multiplies_bf16
from openelm.model.parts import gathered, own_rows

MOMENTUM = 0.95
_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the steepest at zero that end within about 0.7 and 1.2 (Jordan's post)
_EPS = 1e-7
_RMS = 0.2


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return nearly U·Vᵀ of each of some matrices (p, n, m) = U·S·Vᵀ, by Newton-Schulz iterations in their dtype.

    Singular values come out between about 0.7 and 1.2, those that are nearly zero below that.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_EPS)  # no singular value is above this
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def iteration_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the iterations, which bear bf16: that where it is multiplied natively, else x's own."""
    native = x.device.type != "cpu" or cpu_multiplies_bf16()
    return torch.bfloat16 if native and x.dtype == torch.float32 else x.dtype


def update_muon(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    count: int,
    like: Tensor,
    *,
    rate: float,
    weight_decay: float,
    divisor: Tensor | None,
) -> None:
    """Update a weight and its momentum in place; both and the gradient are this process's rows of the matrix.

    Args:
        count: of the matrices of equal size that the weight holds, one below the other; each is taken by itself. Of
            the attention's these are heads (arXiv 2602.15763 splits so too; docs/log.md has what it gained).
        like: the parameter, which says which rows they are. Of a shared one every process takes the whole matrix
            through the iterations, and keeps its rows.
        divisor: by what the gradient is divided first; None: it is taken as it is.
    """
    gradient = gradient if divisor is None else gradient / divisor
    momentum.lerp_(gradient, 1 - MOMENTUM)
    ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov
    whole = gathered(ahead.to(iteration_dtype(ahead)), like)
    matrices = whole.view(count, -1, whole.shape[1])
    update = own_rows(orthogonalised(matrices).reshape(whole.shape), like)
    scale = _RMS * math.sqrt(max(matrices.shape[1:]))
    weight.mul_(1 - rate * weight_decay).sub_(update, alpha=rate * scale)
