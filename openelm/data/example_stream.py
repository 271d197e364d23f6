"""Batches of examples for tuning: an endless shuffled order, packed into rows, resumable after every batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from openelm.data.document import Drops
from openelm.data.examples import Examples
from openelm.data.lanes import permutation
from openelm.data.stream import IGNORED_TARGET, Batch, batch_of, padded_byte_lengths, restore_cursors
from openelm.errors import ConfigError, DataError

_NO_EXAMPLE = -1


class ExampleStream:
    """Yield batches without end; each epoch has a new order, a pure function of seed and epoch.

    Batch t holds the next `rows` examples; where an epoch ends inside a batch, the next one goes on there. They are
    packed whole into rows of tokens, no more rows than `pack` needs (and `multiple` asks for), each as short as their
    number allows. A sequence of n tokens takes n - 1 positions, and both sequences of a preference lie side by side.
    What is left of a row is padding: input 0, no target, a document of its own; columns of padding alone are left out.

    So the rows of tokens of a batch differ in number and length from batch to batch.

    Args:
        rows: examples a batch.
        length: the most positions of a row of tokens.
        part: (k, n): give the rows r of tokens with r % n == k only; n must divide `multiple`.
        multiple: the number of rows of tokens is brought to a multiple of this with rows of padding.
        cursors: what `cursors()` returned; the next batch is the one that came after it.

    Raises:
        ConfigError: an example is larger than a row, or the numbers do not fit.
        DataError: E_CHANGED when the cursors were made with other examples or settings.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        seed: int,
        rows: int,
        length: int,
        part: tuple[int, int] = (0, 1),
        multiple: int = 1,
        cursors: list[dict[str, Any]] | None = None,
    ) -> None:
        _check(examples, rows, length, part, multiple)
        self._examples, self._seed, self._rows, self._length = examples, seed, rows, length
        self._part, self._multiple = part, multiple
        self._fingerprint = {
            "examples": examples.sha256,
            "seed": seed,
            "rows": rows,
            "length": length,
            "multiple": multiple,
        }
        self._step, _ = restore_cursors(cursors, self._fingerprint, 0)
        if cursors is not None and cursors[0].get("place") != self._place():
            fix = "take the data state from an undamaged checkpoint"
            raise DataError("the place in the data is not the one after these batches", fix=fix, code="E_CHANGED")
        self._byte_lengths = padded_byte_lengths(examples.byte_lengths)
        self._order = functools.lru_cache(maxsize=2)(self._epoch)

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        chosen = self._next_examples()
        packed = pack_evenly(self._examples.sizes[chosen].tolist(), self._length, self._multiple)
        width = max(sum(self._examples.sizes[chosen[row]].tolist()) for row in packed)
        most = max(map(len, packed))
        own = packed[self._part[0] :: self._part[1]]
        first = not self._step and not self._part[0]
        self._step += 1
        return self._batch([chosen[row] for row in own], width, most, first)

    def _next_examples(self) -> npt.NDArray[np.int64]:
        epoch, index = self._place()
        found = list[npt.NDArray[np.int64]]()
        missing = self._rows
        while missing:
            found.append(self._order(epoch)[index : index + missing])
            missing -= len(found[-1])
            epoch, index = epoch + 1, 0
        return np.concatenate(found)

    def _batch(self, rows: Sequence[npt.NDArray[np.int64]], width: int, most: int, first: bool) -> Batch:
        both = np.zeros((len(rows), 2, width), "<i4")
        both[:, 1] = IGNORED_TARGET
        documents = np.zeros((len(rows), width), np.int32)
        numbers = np.full((len(rows), most), _NO_EXAMPLE, np.int64)
        for row, examples in enumerate(rows):
            numbers[row, : len(examples)] = examples
            start = document = 0
            for sequence in (one for example in examples.tolist() for one in self._examples.sequences(example)):
                end = start + len(sequence.tokens) - 1
                both[row, 0, start:end] = sequence.tokens[:-1]
                both[row, 1, start:end] = np.where(sequence.learned[1:], sequence.tokens[1:], IGNORED_TARGET)
                documents[row, start:end] = document
                start, document = end, document + 1
            documents[row, start:] = document
        bad_rows = self._examples.bad_rows if first else ()
        return batch_of(both, documents, self._byte_lengths, bad_rows, numbers)

    def _place(self) -> list[int]:
        return list(divmod(self._step * self._rows, len(self._examples)))

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        return permutation(f"openelm/examples/{self._seed}/{epoch}", len(self._examples))

    def cursors(self) -> list[dict[str, Any]]:
        """Return the state after the last batch returned, as plain data: the place is epoch and index in its order."""
        return [{"fingerprint": dict(self._fingerprint), "batches": self._step, "place": self._place()}]

    def counts(self) -> Drops:
        """Count the rows that gave no example: source -> reason -> rows; the first part does, for all of them."""
        drops = {} if self._part[0] else self._examples.drops
        return {source: dict(reasons) for source, reasons in drops.items()}


def pack_evenly(sizes: Sequence[int], length: int, multiple: int = 1) -> list[list[int]]:
    """Put items into as many rows as `pack` does, brought to a multiple, that are as short as a search finds.

    All rows of a batch are as wide as its longest one: two full rows and a scrap would be computed as three full ones.
    """
    count = len(pack(sizes, length))
    count += -count % multiple
    least, best = max(*sizes, -(-sum(sizes) // count)), length
    while least < best:
        middle = (least + best) // 2
        if len(pack(sizes, middle)) <= count:
            best = middle
        else:
            least = middle + 1
    rows = pack(sizes, best)
    return rows + [[] for _ in range(count - len(rows))]


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Put items into as few rows as first-fit decreasing finds (at most 11/9 of the fewest, and 6/9 of a row).

    Returns: for each row the indices of its items, in the order in which they were put there.
    """
    rows, room = list[list[int]](), list[int]()
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        row = next((row for row, left in enumerate(room) if left >= sizes[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(item)
        room[row] -= sizes[item]
    return rows


def _check(examples: Examples, rows: int, length: int, part: tuple[int, int], multiple: int) -> None:
    if rows < 1 or multiple < 1:
        raise ConfigError(f"a batch needs at least 1 example and a multiple of at least 1 (given: {rows}, {multiple})")
    if multiple % part[1]:
        fix = f"make multiple a multiple of {part[1]}, or start fewer processes"
        raise ConfigError(f"{part[1]} processes cannot share a multiple of {multiple} rows", fix=fix)
    largest = int(examples.sizes.argmax())
    needed = int(examples.sizes[largest])
    if needed > length:
        what = "both answers of a preference" if examples.per_example == 2 else "an example"
        raise ConfigError(
            f"{what} can take {needed:,} positions (example {largest}), but a row has {length:,}",
            fix=f"set the length of rows to at least {needed:,}, or that of examples lower",
        )
