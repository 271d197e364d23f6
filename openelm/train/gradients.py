"""Gradients of a batch as one flat tensor, added up in an order that the number of processes does not change.

The rows of a batch form `shards`: shard g has the rows r with r % shards == g. Each shard's gradient is added up row by
row; the shards' gradients are added in one fixed binary tree, whose subtrees are the shards of equal g % 2, then
g % 4, … . A process owns the shards g with g % processes == rank, which is a whole subtree, so 1, 2 and 4 processes
take the same sums of the same numbers and get the same bits (the idea is the fixed-order summation of RepOps,
arXiv 2502.19405, on the level of shards).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor, nn

from openelm.kernels.norm import flat_norm
from openelm.train.distributed import ALONE, Processes, Sum

_ALIGNED = 16  # fp32 numbers: 64 bytes, a cache line
_BUCKET = 25 * 2**18  # fp32 numbers: 25 MiB, as in DistributedDataParallel


class FlatGradients:
    """The `.grad` of every parameter as views of one fp32 tensor, with the means of the losses at its beginning.

    It is sent in buckets, from the end to the beginning: a backward pass completes the last parameters first.
    """

    scale = 1
    """By what a loss is multiplied before its backward pass."""

    def __init__(self, parameters: Iterable[nn.Parameter], processes: Processes = ALONE, *, sums: int = 2) -> None:
        assert sums <= _ALIGNED
        self._processes = processes
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        starts = list(accumulate((_aligned(parameter) for parameter in learning), initial=_ALIGNED))
        self.values = torch.zeros(starts[-1], dtype=torch.float32, device=learning[0].device)
        self.losses = self.values[:sums]
        """Mean loss, mean nats, and the objective's statistics."""
        self._cuts = [starts.pop()]
        """Where buckets end and begin, in the order in which they are sent."""
        self._sizes: list[int] = [0]
        """How many parameters each has."""
        self._left: list[int] | None = None
        self._sums: list[Sum] = []
        for parameter, start in zip(reversed(learning), reversed(starts), strict=True):
            if parameter.dtype != torch.float32:
                parameter.grad_dtype = torch.float32  # the gradients of a bf16 parameter are added up in fp32
            parameter.grad = self.values[start : start + parameter.numel()].view_as(parameter)
            complete = functools.partial(self._complete, len(self._sizes) - 1)
            parameter.register_post_accumulate_grad_hook(complete)  # type: ignore[no-untyped-call]
            self._sizes[-1] += 1
            if self._cuts[-1] - start >= _BUCKET:
                self._cuts.append(start)
                self._sizes.append(0)
        self._cuts.append(0)

    def expect(self, *, last: bool) -> None:
        """Say whether the next backward pass is the last one before `add_up`, which may send what is complete."""
        self._left = list(self._sizes) if last else None

    def _complete(self, bucket: int, parameter: Tensor) -> None:
        if self._left is not None:
            self._left[bucket] -= 1
            while len(self._sums) < len(self._sizes) - 1 and not self._left[len(self._sums)]:
                self._send()

    def _send(self) -> None:
        end, start = self._cuts[len(self._sums) : len(self._sums) + 2]
        self._sums.append(self._processes.begin_to_add(self.values[start:end]))

    def add_up(self) -> None:
        """Add up the gradients and losses of all processes: send the buckets that are left, the losses in the last."""
        while len(self._sums) < len(self._sizes):
            self._send()
        self._processes.finish(self._sums)
        self._sums, self._left = [], None

    def norm(self) -> Tensor:
        """Return the norm of all gradients, reading them once."""
        return flat_norm(self.values[_ALIGNED:])

    def clear(self) -> None:
        """Set everything to zero, keeping the memory."""
        self.values.zero_()


def _aligned(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() // _ALIGNED) * _ALIGNED


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
