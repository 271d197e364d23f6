"""The blocks of a file as one stretch of memory: a data set of terabytes has millions, in every worker process."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from openelm.data.document import Block

_NUMBERS = len(Block._fields)
_LAYOUTS = {4: struct.Struct(f"<{_NUMBERS}I"), 8: struct.Struct(f"<{_NUMBERS}Q")}  # by bytes a number


class Blocks(Sequence[Block]):
    """An immutable sequence of blocks: 20 bytes each, or 40 where a number of the file needs more than 32 bits.

    Args:
        blocks: the five numbers of each, in the order of `Block`.

    Raises:
        ValueError: an entry is not five whole numbers from 0 on.
    """

    __slots__ = ("_data", "_layout", "_width")

    def __init__(self, blocks: Iterable[Sequence[int]] = ()) -> None:
        listed = list(blocks)
        table = np.array(listed) if listed else np.empty((0, _NUMBERS), np.uint8)
        if table.shape != (len(listed), _NUMBERS) or table.dtype.kind not in "iu" or table.min(initial=0) < 0:
            raise ValueError("a block is five whole numbers from 0 on")
        width = 4 if table.max(initial=0) < 1 << 32 else 8
        self._restore(table.astype(f"<u{width}").tobytes(), width)

    def _restore(self, data: bytes, width: int) -> None:
        self._data, self._width, self._layout = data, width, _LAYOUTS[width]

    @property
    def rows(self) -> int:
        """Count the rows of all blocks."""
        return int(self._table()[:, Block._fields.index("rows")].sum())

    @property
    def bytes(self) -> int:
        """Say about how much text all blocks hold."""
        return int(self._table()[:, Block._fields.index("bytes")].sum())

    def to_json(self) -> list[list[int]]:
        """Return plain data that `Blocks` turns into an equal sequence."""
        listed: list[list[int]] = self._table().tolist()
        return listed

    def _table(self) -> npt.NDArray[Any]:
        return np.frombuffer(self._data, f"<u{self._width}").reshape(-1, _NUMBERS)

    def __len__(self) -> int:
        return len(self._data) // self._layout.size

    @overload
    def __getitem__(self, at: int) -> Block: ...
    @overload
    def __getitem__(self, at: slice) -> Blocks: ...
    def __getitem__(self, at: int | slice) -> Block | Blocks:
        if isinstance(at, slice):
            return Blocks(self._table()[at].tolist())
        try:  # negative places count from the end, as they do everywhere
            return tuple.__new__(Block, self._layout.unpack_from(self._data, at * self._layout.size))
        except struct.error:
            raise IndexError(f"block {at} of {len(self)}") from None

    def __iter__(self) -> Iterator[Block]:
        return map(Block._make, self._layout.iter_unpack(self._data))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and (self._width, self._data) == (other._width, other._data)

    def __hash__(self) -> int:
        return hash(self._data)

    def __repr__(self) -> str:
        return f"Blocks({self.to_json()})"

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self._data, self._width)


def _restored(data: bytes, width: int) -> Blocks:
    blocks = Blocks.__new__(Blocks)
    blocks._restore(data, width)
    return blocks
