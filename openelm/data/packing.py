"""One lane: documents to rows of tokens, with a cursor that a row can be resumed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openelm.data.document import BadRow, Document, Drops, add_drops
from openelm.data.exclude import Exclusions
from openelm.data.filters import token_filter
from openelm.data.lanes import Position
from openelm.data.mixture import choose_source
from openelm.data.reading import SourceReader, reason_to_drop
from openelm.errors import DataError
from openelm.text.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int32]
DROPS_IN_A_ROW = 100_000


@dataclass(frozen=True, slots=True)
class RowSettings:
    """How a lane makes rows of documents; `excluded` are dropped although they could be used."""

    length: int
    min_characters: int
    min_tokens: int
    on_bad_row: str
    excluded: Exclusions | None = None


class Lane:
    """An endless stream of rows; the token that ends a row begins the next one.

    Args:
        sources: this lane's reader of each source.
        cursor: where to go on, as returned by `cursor()`; None starts from the beginning.

    Raises:
        DataError: the cursor does not belong to this data.
    """

    def __init__(
        self,
        number: int,
        sources: Sequence[SourceReader],
        tokenizer: Tokenizer,
        settings: RowSettings,
        cursor: Mapping[str, Any] | None = None,
    ) -> None:
        self._number, self._sources, self._tokenizer, self._settings = number, sources, tokenizer, settings
        assert tokenizer.bos_id is not None and tokenizer.eos_id is not None  # BatchStream refuses such tokenizers
        self._bos_id, self._eos_id = tokenizer.bos_id, tokenizer.eos_id
        self._weights = [reader.source.weight for reader in sources]
        self._positions = [Position() for _ in sources]
        self._taken_tokens = [0 for _ in sources]
        self._longest = 0  # tokens of the longest document so far; decides the mixture
        self._offset = 0  # of the next row's first token in the current document
        self._drops: Drops = {}
        self._bad_rows: list[BadRow] = []
        self._document: Tokens | None = None
        self._index = 0  # of the source it is from
        if cursor is not None:
            self._restore(cursor)

    def cursor(self) -> dict[str, Any]:
        """Return where the next row starts and what was dropped before it, as plain data of constant size."""
        drops = {source: dict(reasons) for source, reasons in self._drops.items()}
        pairs = zip(self._positions, self._taken_tokens, strict=True)
        places = [[*place.numbers(), taken] for place, taken in pairs]
        return {"sources": places, "offset": self._offset, "longest": self._longest, "dropped": drops}

    def take_bad_rows(self) -> list[BadRow]:
        """Return the rows that were passed over since the last call because they are bad."""
        taken, self._bad_rows = self._bad_rows, []
        return taken

    def row(self, tokens: Tokens, documents: Tokens) -> None:
        """Fill in the next row: tokens (length + 1,) and, for each, the index of its document within the row.

        Raises:
            DataError: a bad row under the policy "error", a damaged or changed file, or no usable document.
        """
        filled = index = 0
        while True:
            current = self._document if self._document is not None else self._next_document()
            piece = current[self._offset : self._offset + len(tokens) - filled]
            end = filled + len(piece)
            tokens[filled:end], documents[filled:end] = piece, index
            self._offset += len(piece)
            if end == len(tokens):
                self._offset -= 1
                return
            self._advance(len(current))
            filled, index = end, index + 1

    def _next_document(self) -> Tokens:
        """Find and return the document at the lane's place, passing over documents that are dropped."""
        for dropped in range(DROPS_IN_A_ROW):
            self._index = choose_source(self._taken_tokens, self._weights, self._number, self._longest)
            reader = self._sources[self._index]
            row, position = reader.row(self._positions[self._index])
            reason = reason_to_drop(row, self._settings.on_bad_row, self._settings.min_characters)
            if reason is None:
                assert isinstance(row, Document)
                reason = self._settings.excluded.reason(row) if self._settings.excluded else None
            if reason is None:
                assert isinstance(row, Document)
                self._document, reason = self._tokenize(row)
            if reason is None:
                assert self._document is not None
                self._positions[self._index] = position
                return self._document
            add_drops(self._drops, {reader.source.name: {reason: 1}})
            if isinstance(row, DataError):
                self._bad_rows.append(reader.describe(row))
            self._positions[self._index] = after(position)
            if dropped >= 64 * reader.rows:
                break
        raise nothing_usable(dropped + 1, self._number, self._drops)

    def _tokenize(self, document: Document) -> tuple[Tokens | None, str | None]:
        ids = self._tokenizer.encode_array(document.text)
        reason = token_filter(len(ids) + 2, self._settings.min_tokens)
        if reason is not None:
            return None, reason
        tokens = np.empty(len(ids) + 2, np.int32)
        tokens[0], tokens[1:-1], tokens[-1] = self._bos_id, ids, self._eos_id
        return tokens, None

    def _advance(self, length_tokens: int) -> None:
        self._taken_tokens[self._index] += length_tokens
        self._longest = max(self._longest, length_tokens)
        self._positions[self._index] = after(self._positions[self._index])
        self._offset, self._document = 0, None

    def _restore(self, cursor: Mapping[str, Any]) -> None:
        try:
            places = [[int(value) for value in place] for place in cursor["sources"]]
            self._positions = [Position(*place[:4]) for place in places]
            self._taken_tokens = [place[4] for place in places]
            self._offset = int(cursor["offset"])
            self._longest = int(cursor["longest"])
            add_drops(self._drops, cursor["dropped"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise bad_cursor(self._number) from None
        numbers = [value for place in places for value in place]
        if len(places) != len(self._sources) or min([*numbers, self._offset, self._longest]) < 0:
            raise bad_cursor(self._number)
        if self._offset and self._offset >= len(self._next_document()):
            raise bad_cursor(self._number)


def after(position: Position) -> Position:
    """Return the place behind a document's."""
    return Position(position.epoch, position.window, position.slice, position.index + 1)


def bad_cursor(lane: int) -> DataError:
    """Describe a cursor that is not this lane's."""
    fix = "take the data state from an undamaged checkpoint"
    return DataError(f"the cursor of lane {lane} does not fit this data", fix=fix, code="E_CHANGED")


def nothing_usable(dropped: int, lane: int, drops: Drops) -> DataError:
    """Describe a lane that drops everything it reads."""
    return DataError(
        f"no usable document among {dropped:,} in a row; dropped by lane {lane}: {drops}",
        fix="lower data.min_tokens or data.min_characters, or give longer documents",
        code="E_EMPTY",
    )
