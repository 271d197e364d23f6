"""Gradients of a batch as one flat tensor, added up in an order that the number of processes does not change.

The rows of a batch form `shards`: shard g has the rows r with r % shards == g. Each shard's gradient is added up row by
row; the shards' gradients are added in one fixed binary tree, whose subtrees are the shards of equal g % 2, then
g % 4, … . A process owns the shards g with g % processes == rank, which is a whole subtree, so 1, 2 and 4 processes
take the same sums of the same numbers and get the same bits (the idea is the fixed-order summation of RepOps,
arXiv 2502.19405, on the level of shards).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from openelm.train.distributed import ALONE, Processes

_ALIGNED = 16  # fp32 numbers: 64 bytes, a cache line


class FlatGradients:
    """The `.grad` of every parameter as views of one fp32 tensor, with two more numbers at its end for the losses."""

    scale = 1
    """By what a loss is multiplied before its backward pass."""

    def __init__(self, parameters: Iterable[nn.Parameter], processes: Processes = ALONE) -> None:
        self._processes = processes
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        starts, size = [], 0
        for parameter in self._parameters:
            starts.append(size)
            size += -(-parameter.numel() // _ALIGNED) * _ALIGNED
        device = self._parameters[0].device
        self.values = torch.zeros(size + 2, dtype=torch.float32, device=device)
        self.losses = self.values[size:]
        """(loss sum, nats)."""
        for parameter, start in zip(self._parameters, starts, strict=True):
            parameter.grad = self.values[start : start + parameter.numel()].view_as(parameter)

    def expect(self, *, last: bool) -> None:
        """Say whether the next backward pass is the last one of the step; nothing is sent before `add_up`."""

    def add_up(self) -> None:
        """Add up the gradients and losses of all processes."""
        self._processes.add(self.values)

    def clear(self) -> None:
        """Set everything to zero, keeping the memory."""
        self.values.zero_()


class Tree:
    """Add up tensors in the order of a binary tree's leaves, keeping one partial sum a level."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, Tensor]] = []

    def add(self, leaf: Tensor) -> None:
        """Take the next leaf; it is copied."""
        level = 0
        while self._sums and self._sums[-1][0] == level:
            level, total = self._sums.pop()
            leaf = total.add_(leaf)
            level += 1
        self._sums.append((level, leaf if level else leaf.clone()))

    def total(self) -> Tensor:
        """Return the sum; there must have been a power of two of leaves."""
        ((_, total),) = self._sums
        return total


def leaf_order(shards: int) -> list[int]:
    """Order the leaves so that neighbours differ in their highest bit first: 0 2 1 3, or 0 4 2 6 1 5 3 7.

    `shards` must be a power of two.
    """
    order = [0]
    while len(order) < shards:
        order = [2 * leaf for leaf in order] + [2 * leaf + 1 for leaf in order]
    return order
