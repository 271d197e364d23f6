"""Document order as a pure function of (seed, source, lane, epoch), so there is no state to restore wrongly.

Each epoch permutes all blocks of a source. Written one epoch after the other they form an endless sequence,
and lane i of L takes its places i, i + L, i + 2L, …, so every document comes exactly once per epoch over all
lanes, and no lane runs dry, however few blocks there are. A lane permutes the documents inside a window: a
few blocks, or a slice of them when they are large, so that a window fits in memory.
"""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from openelm.data.document import Block
from openelm.data.manifest import Source

WINDOW_BLOCKS = 8
WINDOW_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A document's place in a lane's endless order of one source."""

    epoch: int = 0
    window: int = 0
    slice: int = 0
    index: int = 0

    def numbers(self) -> list[int]:
        """Return what `Position(*numbers)` takes; dataclasses.astuple takes eighty times as long."""
        return [self.epoch, self.window, self.slice, self.index]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows [first, first + rows) of a block of a shard."""

    shard: int
    block: Block
    first: int
    rows: int


def permutation(key: str, size: int) -> npt.NDArray[np.int64]:
    """Return the permutation of `size` items that a key stands for.

    The order of 64-bit words from SHAKE-256: uniform, and the same on every machine and numpy version.
    """
    words = np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * size), dtype="<u8")
    return np.argsort(words, kind="stable").astype(np.int64)


@functools.lru_cache(maxsize=64)
def _epoch_permutation(key: str, size: int) -> npt.NDArray[np.uint32]:
    """Keep what `permutation` returns in half the memory: a source of trillions of tokens has millions of blocks."""
    assert size < 1 << 32
    return permutation(key, size).astype(np.uint32)


class DocumentOrder:
    """The order in which the lanes of a run read one source."""

    def __init__(self, source: Source, *, seed: int, lanes: int) -> None:
        self.source, self._lanes = source, lanes
        self._key = f"openelm/{seed}/{source.name}"
        # Ends of the shards in a numbering of all blocks; a list of the blocks themselves would be as long as they are.
        self._ends = list(accumulate(len(shard.blocks) for shard in source.shards))
        total_bytes = sum(shard.blocks.bytes for shard in source.shards)
        mean_bytes = total_bytes // self._ends[-1]
        self._window_blocks = max(1, min(WINDOW_BLOCKS, WINDOW_BYTES // max(1, mean_bytes)))

    def stretches(self, lane: int, position: Position) -> list[Stretch]:
        """List what a slice reads; nothing when the position is past the end of its window or epoch."""
        blocks = self._window(lane, position.epoch, position.window)
        count = self._slices(blocks)
        if position.slice >= count:
            return []
        cut = [
            (shard, block, block.rows * position.slice // count, block.rows * (position.slice + 1) // count)
            for shard, block in blocks
        ]
        return [Stretch(shard, block, start, stop - start) for shard, block, start, stop in cut]

    def places(self, lane: int, position: Position, rows: int) -> npt.NDArray[np.int64]:
        """Permute the `rows` documents of a slice: place in the lane -> place in reading order."""
        key = f"{self._key}/lane {lane}/{position.epoch}/{position.window}/{position.slice}"
        return permutation(key, rows)

    def next_slice(self, lane: int, position: Position) -> Position:
        """Return the start of the slice after a position's, in the next window or epoch if need be."""
        epoch, window, slice_ = position.epoch, position.window, position.slice + 1
        if slice_ >= self._slices(self._window(lane, epoch, window)):
            window, slice_ = window + 1, 0
        while not self._places(lane, epoch, window):
            epoch, window = epoch + 1, 0
        return Position(epoch, window, slice_)

    def documents(self, lane: int, epoch: int) -> Iterator[tuple[int, int]]:
        """Yield (shard, row) of every document of a lane in an epoch, in order."""
        position = Position(epoch)
        while position.epoch == epoch:
            rows = [
                (part.shard, part.block.first_row + part.first + row)
                for part in self.stretches(lane, position)
                for row in range(part.rows)
            ]
            yield from (rows[place] for place in self.places(lane, position, len(rows)))
            position = self.next_slice(lane, position)

    def _window(self, lane: int, epoch: int, window: int) -> list[tuple[int, Block]]:
        order = _epoch_permutation(f"{self._key}/{epoch}", self._ends[-1])
        return [self._block(int(order[place])) for place in self._places(lane, epoch, window)]

    def _places(self, lane: int, epoch: int, window: int) -> range:
        """List a window's places in the epoch's permutation; none past the lane's end."""
        count = self._ends[-1]
        first = -(-(epoch * count - lane) // self._lanes) + window * self._window_blocks
        stop = -(-((epoch + 1) * count - lane) // self._lanes)
        start, stop = lane - epoch * count, min(stop, first + self._window_blocks)
        return range(start + self._lanes * first, start + self._lanes * stop, self._lanes)

    def _block(self, number: int) -> tuple[int, Block]:
        """Find a block by its number over all shards, with the shard it is in."""
        shard = bisect_right(self._ends, number)
        blocks = self.source.shards[shard].blocks
        return shard, blocks[number - self._ends[shard]]  # counted from the shard's end: negative

    def _slices(self, blocks: list[tuple[int, Block]]) -> int:
        size, rows = sum(block.bytes for _, block in blocks), sum(block.rows for _, block in blocks)
        return max(1, min(rows, -(-size // WINDOW_BYTES)))
