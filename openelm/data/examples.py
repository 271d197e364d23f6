"""Examples for instruction and preference tuning: read, recognised, encoded, and held in memory.

Which shapes of rows there are says `openelm.data.shapes`; what of an example is learned, `openelm.data.encoding`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from openelm.data.choices import is_question, question_digest, question_identity
from openelm.data.document import BadRow, Drops, add_drops
from openelm.data.encoding import Encoded, Encoder, Kind, Learn, OnLong
from openelm.data.manifest import Manifest
from openelm.data.rows import Place, read_rows
from openelm.data.shapes import Answer, Chat, Pair, answer_of, pair_of
from openelm.errors import ConfigError, DataError
from openelm.text.tokenizer import Tokenizer

_BATCH_ROWS = 1024
_IDS = ("id", "doc_id")


@dataclass(frozen=True, eq=False)
class Examples:
    """Encoded examples, each of one sequence, or of a chosen and a rejected one.

    Args:
        tokens: int32 (all tokens,), of all sequences one after the other.
        learned: bool (all tokens,), whether each token is a target that is learned.
        ends: int64 (sequences,), where each sequence ends in these.
        per_example: sequences of an example, 1 or 2.
        byte_lengths: int32 (vocabulary,), the bytes of text that each id stands for.
        drops: rows that gave no example: source -> reason -> rows.
        bad_rows: those of them that are bad.
        chats: how many examples are in the chat format.
    """

    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.int64]
    per_example: int
    byte_lengths: npt.NDArray[np.int32]
    drops: Drops
    bad_rows: tuple[BadRow, ...]
    chats: int = 0

    def __len__(self) -> int:
        return len(self.ends) // self.per_example

    def sequences(self, index: int) -> tuple[Encoded, ...]:
        """Return an example's sequence, or its chosen and its rejected one; views, not copies."""
        first = index * self.per_example
        return tuple(self._sequence(at) for at in range(first, first + self.per_example))

    def _sequence(self, at: int) -> Encoded:
        place = slice(int(self.ends[at - 1]) if at else 0, int(self.ends[at]))
        return Encoded(self.tokens[place], self.learned[place])

    def first(self, count: int) -> Examples:
        """Return the first examples, at most `count`."""
        sequences = min(count, len(self)) * self.per_example
        if sequences == len(self.ends):
            return self
        end = int(self.ends[sequences - 1])
        return dataclasses.replace(
            self, tokens=self.tokens[:end], learned=self.learned[:end], ends=self.ends[:sequences]
        )

    @property
    def learned_tokens(self) -> int:
        """How many tokens are targets."""
        return int(self.learned.sum())

    def facts(self) -> dict[str, Any]:
        """Return what a ledger records of them, as plain data."""
        return {
            "count": len(self),
            "chats": self.chats,
            "tokens": len(self.tokens),
            "learned_tokens": self.learned_tokens,
            "sha256": self.sha256,
            "dropped": self.drops,
        }

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """The input positions that each example takes in a row, (examples,): a sequence's last token is no input."""
        sizes: npt.NDArray[np.int64] = (np.diff(self.ends, prepend=0) - 1).reshape(-1, self.per_example).sum(1)
        return sizes

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of all sequences in their order, and of what is learned of them."""
        digest = hashlib.sha256(f"openelm examples, {self.per_example} sequences each\n".encode())
        digest.update(self.ends.astype("<i8").tobytes())
        digest.update(self.tokens.astype("<i4").tobytes())
        digest.update(self.learned.astype("u1").tobytes())
        return digest.hexdigest()


def load_examples(
    manifest: Manifest,
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    length: int,
    prompt_tokens: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    on_long: OnLong = "error",
    learn: Learn = "answers",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Examples:
    """Read and encode all examples, in file order.

    A row is bad, too, that has the `id`, else the `doc_id`, of an earlier row of its source;
    of a question with choices, if the same file has the same row twice or asks something else under its number.

    Args:
        manifest: made of `whole_rows(sources)`, if there are Parquet files.
        kind: "answers": one sequence an example; "preferences": two, chosen and rejected.
        length, prompt_tokens, on_long, learn: as for `Encoder`; `prompt_tokens` is for preferences.
        on_bad_row: "skip" counts and lists a bad row; its reason is its error code. Examples over `length` are counted
            and listed likewise, if `on_long` lets them pass.
        progress: told how many rows of how many are done.

    Raises:
        ConfigError: `prompt_tokens` for answers, or a limit is too small.
        DataError: a bad row with its file and line; E_TOO_LONG; E_EMPTY when no example is left; E_TOKENIZER for a
            tokenizer without EOS; a damaged or changed file.
    """
    if prompt_tokens is not None and kind != "preferences":
        raise ConfigError("prompt_tokens is for preferences only", fix="leave it out, and set length")
    encoder = Encoder(tokenizer, length, prompt_tokens, on_long, learn)
    loader = _Loader(encoder, pair_of if kind == "preferences" else answer_of, on_bad_row)
    total = sum(source.rows for source in manifest.sources)
    for done, place in enumerate(read_rows(manifest)):
        if done % _BATCH_ROWS == 0:
            loader.flush()
            progress(done, total)
        loader.take(place)
    loader.flush()
    progress(total, total)
    return loader.examples(2 if kind == "preferences" else 1)


class _Seen:
    """Which rows came before."""

    def __init__(self) -> None:
        self._ids: set[tuple[str, str, str | int]] = set()
        self._questions: dict[tuple[str, str, str, int], bytes] = {}
        self._requests: dict[tuple[str, str, str], set[int]] = {}
        self._last: tuple[Any, bytes] = None, b""

    def is_new(self, place: Place, row: Mapping[str, Any]) -> bool:
        """Tell whether a row is no other choice of a question that came before.

        Raises:
            DataError: E_DUPLICATE for an id that came before; E_SCHEMA for a question without a number.
        """
        if is_question(row):
            return self._is_new_question(place, row)
        for name in _IDS:
            value = row.get(name)
            if isinstance(value, str | int) and value != "":
                key = (place.source.name, name, value)
                if key in self._ids:
                    raise _duplicate(f"{name} {str(value)[:80]!r} is also an earlier row's")
                self._ids.add(key)
                break
        return True

    def _is_new_question(self, place: Place, row: Mapping[str, Any]) -> bool:
        task, number, request = question_identity(row)
        file = (place.source.name, place.shard.name, task)
        requests = self._requests.setdefault(file, set())
        if request in requests:
            raise _duplicate(f"choice {row['idx']} of doc_id {row['doc_id']} came before")
        requests.add(request)
        if row["doc"] != self._last[0]:  # the rows of a question follow each other
            self._last = row["doc"], question_digest(row["doc"])
        digest = self._last[1]
        before = self._questions.get((*file, number))
        if before is None:
            self._questions[*file, number] = digest
        elif before != digest:
            raise _duplicate(f"doc_id {row['doc_id']} is also another question's")
        return before is None


@dataclass
class _Loader:
    encoder: Encoder
    recognise: Callable[[Mapping[str, Any]], Answer | Pair]
    on_bad_row: str
    seen: _Seen = field(default_factory=_Seen)
    waiting: list[tuple[Place, Answer | Pair]] = field(default_factory=list)
    tokens: list[npt.NDArray[np.int32]] = field(default_factory=list)
    learned: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    drops: Drops = field(default_factory=dict)
    bad_rows: list[BadRow] = field(default_factory=list)
    chats: int = 0

    def take(self, place: Place) -> None:
        """Recognise a row and put it among those that wait to be encoded."""
        value = place.row.value
        if value is None:
            add_drops(self.drops, {place.source.name: {"empty": 1}})
            return
        try:
            if isinstance(value, DataError):
                raise value
            if self.seen.is_new(place, value):
                self.waiting.append((place, self.recognise(value)))
        except DataError as error:
            self._drop(place, error, stop=self.on_bad_row == "error")

    def flush(self) -> None:
        """Encode what waits."""
        waiting, self.waiting = self.waiting, []
        sequences = list[Encoded]()
        for (place, item), result in zip(waiting, self.encoder.encode([item for _, item in waiting]), strict=True):
            if isinstance(result, DataError):
                self._drop(place, result, stop=self.encoder.on_long == "error")
            else:
                sequences += result
                self.chats += isinstance(item.chosen if isinstance(item, Pair) else item, Chat)
        if sequences:
            self.tokens.append(np.concatenate([sequence.tokens for sequence in sequences]))
            self.learned.append(np.concatenate([sequence.learned for sequence in sequences]))
            self.lengths += [len(sequence.tokens) for sequence in sequences]

    def _drop(self, place: Place, error: DataError, *, stop: bool) -> None:
        place.locate(error)
        if stop:
            self.flush()  # an earlier row that is too long is named first
            raise error
        add_drops(self.drops, {place.source.name: {error.code: 1}})
        self.bad_rows.append(place.describe(error))

    def examples(self, per_example: int) -> Examples:
        """Put everything together.

        Raises:
            DataError: E_EMPTY when there is no example.
        """
        if not self.lengths:
            what = f"no example is left; dropped: {self.drops}"
            raise DataError(what, fix="give other rows, or raise length", code="E_EMPTY")
        ends = np.cumsum(self.lengths, dtype=np.int64)
        tokens, learned = np.concatenate(self.tokens), np.concatenate(self.learned)
        byte_lengths = self.encoder.tokenizer.byte_lengths()
        return Examples(tokens, learned, ends, per_example, byte_lengths, self.drops, tuple(self.bad_rows), self.chats)


def _duplicate(what: str) -> DataError:
    fix = "take one of the rows out, or set on_bad_row = 'skip'"
    return DataError(what, fix=fix, code="E_DUPLICATE")
