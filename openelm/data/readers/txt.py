"""Plain text: one file is one document, or is cut at blank lines into several."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import BinaryIO

from openelm.data.document import (
    BLOCK_BYTES,
    BLOCKS_PER_FILE,
    Block,
    Document,
    ReadOptions,
    decode_text,
    too_long,
)
from openelm.data.remote import DataPath
from openelm.errors import DataError
from openelm.files.hashes import sha256_bytes

_BOM = b"\xef\xbb\xbf"
_FIX = "set document_bytes to cut the file at blank lines, or raise max_document_bytes"


def scan(
    path: DataPath, options: ReadOptions, *, strict: bool = True, block_bytes: int = BLOCK_BYTES
) -> tuple[Block, ...]:
    """Cut a file into blocks of whole documents.

    Raises:
        DataError: E_LINE_TOO_LONG when `strict` and a document is over the source's limit.
    """
    size = path.stat().st_size
    target = min(block_bytes, size // BLOCKS_PER_FILE)
    starts: list[tuple[int, int]] = []
    row = -1
    with path.open("rb") as file:
        for row, (offset, data) in enumerate(_cut(file, _start(file), options)):
            if data is None and strict:
                raise too_long(path, options.max_document_bytes, line=None, offset=offset, fix=_FIX)
            if not starts or offset - starts[-1][1] >= target:
                starts.append((row, offset))
    return tuple(
        Block(first, next_row - first, offset, 0, end - offset)
        for (first, offset), (next_row, end) in pairwise([*starts, (row + 1, size)])
    )


def read(path: DataPath, block: Block, options: ReadOptions, first: int = 0) -> Iterator[Document | DataError]:
    """Yield the documents of a block from its row `first` on; a bad one is yielded as its error."""
    with path.open("rb") as file:
        for row, (offset, data) in enumerate(_cut(file, block.offset, options), block.first_row):
            if row == block.first_row + block.rows:
                return
            if row < block.first_row + first:
                continue
            if data is None:
                yield too_long(path, options.max_document_bytes, line=None, offset=offset, fix=_FIX)
                continue
            text = decode_text(data, path, line=None, offset=offset)
            if isinstance(text, DataError):
                text.line, text.row_sha256 = _line_of(path, text.offset or 0), sha256_bytes(data)
                yield text
            else:
                yield Document(text, options.source, str(path), row)


def _start(file: BinaryIO) -> int:
    return len(_BOM) if file.read(len(_BOM)) == _BOM else 0


def _cut(file: BinaryIO, offset: int, options: ReadOptions) -> Iterator[tuple[int, bytes | None]]:
    """Yield (offset, bytes) of each document from a document's start on; None as soon as one is too long.

    A document ends after the first run of blank lines that starts at or after `document_bytes` of it.
    """
    limit = options.max_document_bytes
    file.seek(offset)
    parts: list[bytes] = []
    size, line_starts, ended = 0, True, False
    while line := file.readline(limit + 1):
        blank = line_starts and line.isspace()
        if ended and not blank:
            if size <= limit:
                yield offset, b"".join(parts)
            offset, size, ended = offset + size, 0, False
            parts.clear()
        ended = ended or (blank and options.document_bytes is not None and size >= options.document_bytes)
        before, size = size, size + len(line)
        if size <= limit:
            parts.append(line)
        elif before <= limit:
            parts.clear()
            yield offset, None
        line_starts = line.endswith(b"\n")
    if 0 < size <= limit:
        yield offset, b"".join(parts)


def _line_of(path: DataPath, offset: int) -> int:
    line = 1
    with path.open("rb") as file:
        while offset > 0 and (data := file.read(min(1 << 20, offset))):
            line += data.count(b"\n")
            offset -= len(data)
    return line
