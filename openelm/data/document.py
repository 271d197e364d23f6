"""The values that readers, lanes and filters hand to each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from openelm.data.remote import DataPath
from openelm.errors import DataError

MAX_DOCUMENT_BYTES = 16 << 20
BLOCK_BYTES = 1 << 20
BLOCKS_PER_FILE = 64  # small files are cut finer, so that a few thousand rows still spread over the lanes


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from; `row` counts from 0 within the file."""

    text: str
    source: str
    path: str
    row: int


class Block(NamedTuple):
    """A stretch of rows that can be read without reading the whole file.

    Args:
        first_row, rows: the rows of the file it holds.
        offset: where reading starts: a byte in a plain file, the first byte of a frame in a compressed one,
            the number of a row group in Parquet.
        skip_rows: line ends (rows in Parquet) to pass over from there.
        bytes: about how much text it holds.
    """

    first_row: int
    rows: int
    offset: int
    skip_rows: int = 0
    bytes: int = 0


class Row(NamedTuple):
    """One row of JSON or Parquet as it stands, before anything is asked of it.

    Args:
        value: the object, the fault of a bad row, or None for a line without text.
        line: counts from 1 within the file; in Parquet the number of the row.
        offset: where it begins, in bytes, if that is known.
        data: its bytes, if the format has them.
    """

    value: dict[str, Any] | DataError | None
    line: int
    offset: int | None = None
    data: bytes | None = None


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How the files of one source become documents; without a text key they are only read as whole rows."""

    source: str
    text_key: str = "text"
    document_bytes: int | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES


Drops = dict[str, dict[str, int]]  # source -> reason -> documents
BadRow = dict[str, str | int | None]
"""A row that was passed over: source, file, line, offset, code, sha256 of its bytes; None for what is not known."""
_MOST_LISTED = 1000


def add_drops(total: Drops, more: Mapping[str, Mapping[str, int]]) -> None:
    """Add one table of dropped documents (source, reason, number) to another, in place."""
    for source, reasons in more.items():
        counts = total.setdefault(source, {})
        for reason, number in reasons.items():
            counts[reason] = counts.get(reason, 0) + number


def list_bad_rows(rows: Iterable[BadRow]) -> dict[str, Any]:
    """Say how many rows were passed over, and which: the first thousand by source, file and place."""
    names = ("source", "file", "line", "offset", "code", "sha256")  # all: files of two folders can share a name
    ordered = sorted(rows, key=lambda row: [(row[name] is not None, row[name] or 0) for name in names])
    return {"count": len(ordered), "rows": ordered[:_MOST_LISTED]}


def decode_text(data: bytes, path: DataPath, *, line: int | None, offset: int) -> str | DataError:
    """Decode UTF-8 strictly; returns the fault, as a value, for bytes that no text file holds."""
    nul = data.find(0)
    if nul >= 0:
        what = f"a NUL byte at byte {nul} of the document: this is not text"
        return bad_text(what, path, line, offset + nul)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = data[error.start : error.start + 4].hex(" ")
        what = f"not UTF-8: bytes {found} at byte {error.start} of the document"
        return bad_text(what, path, line, offset + error.start)


def bad_text(what: str, path: DataPath, line: int | None, offset: int | None = None) -> DataError:
    """Describe a row whose text cannot be used."""
    fix = "save the file as UTF-8 text, or set on_bad_row = 'skip'"
    return DataError(what, fix=fix, file=path, line=line, offset=offset, code="E_TEXT")


def no_such_file(path: DataPath) -> DataError:
    """Describe a file that was named and is not there; for one that a manifest knows see `manifest.unreadable`."""
    return DataError("no such file", fix="check the path", file=path, code="E_PATH")


def too_long(path: DataPath, limit: int, *, line: int | None, offset: int | None, fix: str) -> DataError:
    """Describe a row that is longer than the source allows."""
    what = f"a document is longer than {limit:,} bytes"
    return DataError(what, fix=fix, file=path, line=line, offset=offset, code="E_LINE_TOO_LONG")
