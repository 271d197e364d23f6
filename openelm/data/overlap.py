"""Which documents hold word n-grams of evaluation texts (GPT-3, arXiv:2005.14165, appendix C, uses 13 words)."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openelm.data.document import MAX_DOCUMENT_BYTES, no_such_file
from openelm.data.manifest import unreadable
from openelm.data.readers import format_of
from openelm.data.readers.lines import read_lines
from openelm.errors import DataError

Hashes = npt.NDArray[np.uint64]
_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so no word's bits are lost


@dataclass(frozen=True)
class Overlap:
    """How much of a document is in the evaluation texts.

    Args:
        matches: places of the document where one of their n-grams begins.
        share: the part of its words that such n-grams cover.
    """

    matches: int
    share: float


@dataclass(frozen=True)
class EvaluationFile:
    """What was looked for from one file, and what of it was met."""

    path: str
    texts: int
    too_short: int
    ngrams: int
    met: int


class NgramIndex:
    """All n-grams of the evaluation texts as sorted 64-bit hashes: 8 bytes an n-gram, whatever the corpus.

    Texts are compared word by word: runs of letters and digits in lower case (NFKC), whatever stands between them.
    Of m and k different n-grams some pair is taken for equal with probability m · k / 2^64.

    Args:
        files: text files (one text each), JSON Lines and Parquet (each string of a row is one text).
        words: n.

    Raises:
        DataError: a file is missing or unreadable, or no text has as many words.
    """

    def __init__(self, files: Sequence[Path], words: int = 13) -> None:
        self._words = words
        self._files: list[tuple[str, int, int, Hashes]] = []
        for path in files:
            texts = too_short = 0
            parts: list[Hashes] = []
            for text in evaluation_texts(path):
                hashes = _ngrams(_words(text), words)
                texts, too_short = texts + 1, too_short + (not len(hashes))
                parts.append(hashes)
            unique = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
            self._files.append((str(path), texts, too_short, unique))
        self._known = np.unique(np.concatenate([unique for *_, unique in self._files]))
        self._met = np.zeros(len(self._known), bool)
        if not len(self._known):
            what = f"no evaluation text has {words} words"
            raise DataError(what, fix="lower --words, or give other files", file=self._files[0][0], code="E_EMPTY")

    def overlap(self, text: str) -> Overlap:
        """Compare one document, and remember which n-grams it holds."""
        words = _words(text)
        hashes = _ngrams(words, self._words)
        if not len(hashes):
            return Overlap(0, 0.0)
        places = np.minimum(np.searchsorted(self._known, hashes), len(self._known) - 1)
        hits = np.flatnonzero(self._known[places] == hashes)
        if not len(hits):
            return Overlap(0, 0.0)
        self._met[places[hits]] = True
        covered = np.zeros(len(words), bool)
        for offset in range(self._words):
            covered[hits + offset] = True
        return Overlap(len(hits), float(covered.mean()))

    def files(self) -> list[EvaluationFile]:
        """Say for each file how many of its n-grams were met so far."""
        return [
            EvaluationFile(path, texts, short, len(unique), int(self._met[np.searchsorted(self._known, unique)].sum()))
            for path, texts, short, unique in self._files
        ]


def _words(text: str) -> list[str]:
    # Not the filters' normalisation, which makes one word of "be--that": editions differ in such marks.
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _ngrams(words: Sequence[str], count: int) -> Hashes:
    """Hash each run of `count` words: a polynomial of the words' own hashes, modulo 2^64."""
    size = len(words) - count + 1
    if size < 1:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    total = np.zeros(size, np.uint64)
    for offset in range(count):
        total = total * _MULTIPLIER + hashes[offset : offset + size]
    return total


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    # Not hash(), which differs from process to process; a lone surrogate in an evaluation file is no reason to stop.
    return int.from_bytes(hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little")


def evaluation_texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file: the whole of a text file; every string of every row of JSON Lines or Parquet.

    Raises:
        DataError: the file is missing, damaged or of an unknown format.
    """
    kind = format_of(path)
    try:
        if kind == "txt":
            yield path.read_text("utf-8-sig", errors="replace")
        elif kind == "jsonl":
            for number, line in enumerate(read_lines(path, 0, MAX_DOCUMENT_BYTES), 1):
                yield from _strings(_parsed(line.data, path, number))
        else:
            yield from _parquet_strings(path)
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _parsed(data: bytes | None, path: Path, number: int) -> Any:
    try:
        return json.loads(data or b"null") if (data or b"").strip() else None
    except (ValueError, RecursionError):
        fix = "give JSON Lines: one value a line"
        raise DataError("not valid JSON", fix=fix, file=path, line=number, code="E_JSON") from None


def _parquet_strings(path: Path) -> Iterator[str]:
    import pyarrow.parquet

    arrow: Any = pyarrow
    try:
        for batch in arrow.parquet.ParquetFile(path).iter_batches(256, use_threads=False):
            yield from _strings(batch.to_pylist())
    except arrow.ArrowInvalid as error:
        what = f"damaged Parquet file ({str(error)[:120]})"
        raise DataError(what, fix="fetch the file again", file=path, code="E_CORRUPT") from None


def _strings(value: Any) -> Iterator[str]:
    """Yield every string inside plain data, keys left out."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting.extend(reversed(list(value.values())))
        elif isinstance(value, list):
            waiting.extend(reversed(value))
