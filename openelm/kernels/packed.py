"""Matrices as the C++ kernels read them: for generation on CPUs, where a product is bound by memory or by its units.

So many rows as fill two vectors are one line of memory, in which the next column of all of them follows (fp32), or the
next two (bf16, whole numbers of 8 bits), or of 4 bits the next two in the low halves of bytes and in the high ones the
two that are half a group further on; behind each group of columns stand its scales and biases. Behind the last columns
stand zeros, as many as fill a step of a product. One row of inputs reads
the line once; for many it comes from the caches. It is made in memory for this CPU, and never written to a file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openelm.kernels.native import call, runs_native

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_KINDS_OF_BITS = {8: 2, 4: 3}
_GROUPS = (32, 64)


@dataclass(frozen=True)
class Layout:
    """What a packed matrix is.

    Attributes:
        dtype: of the numbers, or of scales and biases; products have it too.
        bits, group: of whole numbers with a scale and a bias for each `group` of a row; 0 for plain numbers.
        halves: 2 if the upper and the lower half of the rows are wanted together, as gate and up are.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    bits: int = 0
    group: int = 0
    halves: int = 1

    @property
    def is_known(self) -> bool:
        """Tell whether there are kernels for it on this CPU."""
        of_few_bits = self.bits in _KINDS_OF_BITS and self.group in _GROUPS and self.columns % self.group == 0
        whole = self.rows % self.halves == 0
        return runs_native(torch.empty(0, dtype=self.dtype)) and (not self.bits or of_few_bits) and whole

    @property
    def bytes(self) -> int:
        """Count the memory that it takes, a whole number of lines of the cache."""
        found = torch.zeros(1, dtype=torch.int64)
        call("packed_bytes", self.described(None), found)
        return (int(found) + 63) // 64 * 64

    def described(self, memory: Tensor | None) -> Tensor:
        """Describe it as the struct Weight of cpp/packed.h."""
        kind = _KINDS_OF_BITS[self.bits] if self.bits else _KINDS[self.dtype]
        address = 0 if memory is None else memory.data_ptr()
        values = (kind, self.dtype == torch.bfloat16, self.group, self.rows, self.columns, self.halves, address)
        return torch.tensor(values, dtype=torch.int64)


class PackedMatrix:
    """A matrix (rows, columns) in memory of its own or of the caller's.

    Args:
        numbers: (rows, columns), or words (rows, columns · bits / 32) with scales and biases (rows, columns / group).
        memory: uint8 (layout.bytes,) to be filled, see `memory_for`.
    """

    def __init__(
        self,
        layout: Layout,
        numbers: Tensor,
        scales: Tensor | None = None,
        biases: Tensor | None = None,
        *,
        memory: Tensor | None = None,
    ) -> None:
        self.layout = layout
        self.memory = memory_for(layout.bytes) if memory is None else memory
        assert self.memory.is_contiguous() and self.memory.numel() == layout.bytes
        self.description = layout.described(self.memory)
        parts = [None if part is None else part.detach().contiguous() for part in (numbers, scales, biases)]
        call("pack", self.description, *parts)

    def product(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply rows of fp32 or bf16, x (..., columns) -> (..., rows) of the layout's dtype, with fp32 sums.

        Args:
            out: where the result goes: fp32 or bf16, and its rows may be parts of longer ones.
        """
        rows = x.reshape(-1, self.layout.columns)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        if out is None:
            out = torch.empty(*x.shape[:-1], self.layout.rows, dtype=self.layout.dtype)
        assert x.dtype in _KINDS and out.dtype in _KINDS
        found = out.view(-1, self.layout.rows)
        operands = [part for matrix in (rows, found) for part in (matrix, matrix.stride(0), _is_bf16(matrix))]
        call("packed_linear", self.description, len(rows), *operands)
        return out

    def rows(self, indices: Tensor) -> Tensor:
        """Look rows up: int64 (...,) -> (..., columns).

        Raises:
            IndexError: there is no such row.
        """
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.layout.rows:
            raise IndexError(f"an index is outside 0..{self.layout.rows - 1}")
        out = torch.empty(*indices.shape, self.layout.columns, dtype=self.layout.dtype)
        call("packed_rows", self.description, indices.numel(), indices.contiguous(), out, _is_bf16(out))
        return out


def memory_for(count: int) -> Tensor:
    """Reserve uint8 (count,), on large pages and lines of the cache where the system has them."""
    spare = torch.empty(count + 64, dtype=torch.uint8)
    memory = spare[-spare.data_ptr() % 64 :][:count]
    call("large_pages", memory, count)
    return memory


def _is_bf16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16
