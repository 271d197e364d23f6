"""One lane the way the released OpenELM models were trained: a padded row for each piece of 2,048 words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from openelm.data.document import BadRow, Document, Drops, add_drops
from openelm.data.filters import character_filter, token_filter
from openelm.data.lanes import Position
from openelm.data.mixture import choose_source
from openelm.data.packing import DROPS_IN_A_ROW, RowSettings, Tokens, after, bad_cursor, nothing_usable
from openelm.data.reading import SourceReader, reason_to_drop
from openelm.errors import ConfigError, DataError
from openelm.text.tokenizer import Tokenizer

PIECE_WORDS = 2048
PADDING = -1
"""The document index of a row's padding."""


class PieceLane:
    """An endless stream of rows, each [BOS] + ids + [EOS] of one piece, cut or padded to the length.

    Documents are cut at single spaces into pieces of 2,048 words. A piece is dropped when it normalises to too
    few characters; what is left is mended by ftfy in Unicode form NFC, tokenised, and dropped when it has too
    few tokens. Sources take turns by piece, by the tokens that are not padding.

    Args:
        sources, settings, cursor: as of `openelm.data.packing.Lane`.

    Raises:
        ConfigError: ftfy is not installed.
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
        self._length, self._mend = settings.length, text_mender()
        self._weights = [reader.source.weight for reader in sources]
        self._positions = [Position() for _ in sources]
        self._taken_tokens = [0 for _ in sources]
        self._starts = [0 for _ in sources]  # the character where the next piece of each source's document begins
        self._drops: Drops = {}
        self._bad_rows: list[BadRow] = []
        if cursor is not None:
            self._restore(cursor)

    def cursor(self) -> dict[str, Any]:
        """Return where the next row starts and what was dropped before it, as plain data of constant size."""
        drops = {source: dict(reasons) for source, reasons in self._drops.items()}
        triples = zip(self._positions, self._taken_tokens, self._starts, strict=True)
        return {"sources": [[*place.numbers(), taken, start] for place, taken, start in triples], "dropped": drops}

    def take_bad_rows(self) -> list[BadRow]:
        """Return the rows that were passed over since the last call because they are bad."""
        taken, self._bad_rows = self._bad_rows, []
        return taken

    def row(self, tokens: Tokens, documents: Tokens) -> None:
        """Fill in the next row: tokens (length + 1,), and for each 0, or -1 where it is padding.

        Raises:
            DataError: a bad row under the policy "error", a damaged or changed file, or no usable piece.
        """
        dropped = finished = 0
        while dropped < DROPS_IN_A_ROW:
            index = choose_source(self._taken_tokens, self._weights, self._number, self._length + 1)
            reader = self._sources[index]
            if finished > 64 * reader.rows:
                break
            row, self._positions[index] = reader.row(self._positions[index])
            reason = reason_to_drop(row, self._settings.on_bad_row)
            if reason is None and self._settings.excluded:
                assert isinstance(row, Document)
                reason = self._settings.excluded.reason(row)
            ids: Sequence[int] = ()
            if reason is None:
                assert isinstance(row, Document)
                start, end = self._starts[index], _piece_end(row.text, self._starts[index])
                ids, reason = self._tokenize(row.text[start:end])
                self._starts[index] = end + 1
                over = end == len(row.text)
            else:
                over = True
            if over:
                self._positions[index], self._starts[index] = after(self._positions[index]), 0
                finished += 1
            if reason is None:
                self._taken_tokens[index] += len(ids)
                # Padding is never a target, and causality hides it from what is: any id will do, and EOS always exists.
                tokens[: len(ids)], tokens[len(ids) :] = ids, self._eos_id
                documents[: len(ids)], documents[len(ids) :] = 0, PADDING
                return
            add_drops(self._drops, {reader.source.name: {reason: 1}})
            if isinstance(row, DataError):
                self._bad_rows.append(reader.describe(row))
            dropped += 1
        raise nothing_usable(dropped, self._number, self._drops)

    def _tokenize(self, piece: str) -> tuple[Sequence[int], str | None]:
        reason = character_filter(piece, self._settings.min_characters)
        if reason is not None:
            return (), reason
        ids = [self._bos_id, *self._tokenizer.encode(self._mend(piece)), self._eos_id]
        reason = token_filter(len(ids), self._settings.min_tokens)
        return ids[: self._length + 1], reason

    def _restore(self, cursor: Mapping[str, Any]) -> None:
        try:
            places = [[int(value) for value in place] for place in cursor["sources"]]
            self._positions = [Position(*place[:4]) for place in places]
            self._taken_tokens, self._starts = [place[4] for place in places], [place[5] for place in places]
            add_drops(self._drops, cursor["dropped"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise bad_cursor(self._number) from None
        if len(places) != len(self._sources) or min(value for place in places for value in place) < 0:
            raise bad_cursor(self._number)
        for index, start in enumerate(self._starts):
            if start:
                row, position = self._sources[index].row(self._positions[index])
                fits = isinstance(row, Document) and position == self._positions[index]
                if not fits or row.text[start - 1 : start] != " ":  # type: ignore[union-attr]
                    raise bad_cursor(self._number)


def _piece_end(text: str, start: int) -> int:
    """Return where the piece that begins at a character ends: at the 2,048th space from there, or with the text."""
    end = start - 1
    for _ in range(PIECE_WORDS):
        end = text.find(" ", end + 1)
        if end < 0:
            return len(text)
    return end


def text_mender() -> Callable[[str], str]:
    """Return the published mending of text: ftfy's, with Unicode form NFC.

    Raises:
        ConfigError: ftfy is not installed.
    """
    try:
        import ftfy  # here, because only this way of packing needs it
    except ImportError:
        fix = "pip install 'openelm-framework[apple]', or set data.packing = \"documents\""
        raise ConfigError('data.packing = "apple" needs the package ftfy', fix=fix) from None
    return partial(ftfy.fix_text, config=ftfy.TextFixerConfig(normalization="NFC"))


def pieces_fingerprint() -> dict[str, str]:
    """Name what decides the rows besides what decides packed ones: other versions of ftfy mend differently.

    Raises:
        ConfigError: ftfy is not installed.
    """
    text_mender()
    return {"packing": "apple", "ftfy": version("ftfy")}
