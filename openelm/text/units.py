"""Encode each word once: where no piece goes on behind a space, a word's ids do not depend on its neighbours.

BPE joins neighbours inside a piece only. So with such a vocabulary the ids of a text are those of its units, one
after the other, a unit being a run of spaces with the text up to the next one. Units repeat, by Zipf's law.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_CHARACTERS = 1 << 21  # of remembered units: some 150,000 of them, in 30 MB
_find_units = re.compile(r" *[^ ]+| +").findall
_space_behind_text = re.compile(r"[^ ] ").search


def has_units(pieces: Iterable[str]) -> bool:
    """Tell whether no piece has a space behind other text, so that texts can be cut before each run of spaces."""
    return not any(map(_space_behind_text, pieces))


class UnitEncoder:
    """Encodes texts unit by unit and remembers each; those that are new to it go through the library together.

    Args:
        processor: a SentencePiece BPE model that adds nothing to a text, and whose pieces have units.
        byte_lengths: (vocab_size,), the UTF-8 bytes that each id stands for.
    """

    def __init__(self, processor: Any, byte_lengths: NDArray[np.int32]) -> None:
        self._processor, self._byte_lengths = processor, byte_lengths
        self._ids: dict[str, bytes] = {}  # of each unit, as int32
        self._characters = 0

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return what the library would, (ids,) int32."""
        if self._characters > _MOST_CHARACTERS:
            self._ids, self._characters = {}, 0
        known, units = self._ids, _find_units(text)  # another thread may forget, but not these
        parts = list(map(known.get, units))
        if not all(parts):
            self._learn(known, list(dict.fromkeys(unit for unit, part in zip(units, parts, strict=True) if not part)))
            parts = list(map(known.get, units))
        return np.frombuffer(b"".join(parts), np.int32)  # type: ignore[arg-type]

    def _learn(self, known: dict[str, bytes], units: Sequence[str]) -> None:
        self._characters += sum(map(len, units))
        joined = []
        for unit in units:
            if unit[0] == " " and unit[-1] != " ":
                joined.append(unit)
            else:  # it would not stay apart from its neighbours
                known[unit] = self._processor.encode(unit, return_type="numpy").tobytes()
        ids = self._processor.encode("".join(joined), return_type="numpy")
        ends = np.cumsum([len(unit.encode()) for unit in joined])
        stops = np.searchsorted(np.cumsum(self._byte_lengths[ids]), ends) + 1
        data, start = ids.tobytes(), 0
        for unit, stop in zip(joined, (ids.itemsize * stops).tolist(), strict=True):
            known[unit] = data[start:stop]
            start = stop
