"""A JSON file that is one array of objects, plain or compressed: how many instruction data sets are published.

Where such a file begins anew cannot be told from its middle, so it is one block, read whole and held in memory
while its rows are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from openelm.data.document import BLOCK_BYTES, Block, Document, ReadOptions, Row, decode_text, too_long
from openelm.data.readers.jsonl import DECODER, document, not_an_object
from openelm.data.readers.lines import most_text_bytes, read_lines
from openelm.data.remote import DataPath
from openelm.errors import DataError
from openelm.files.hashes import sha256_bytes

_MOST_BYTES = 2 << 30
_LENIENT = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_FIX = "mend the file, or write it as JSON Lines, where one bad row costs no other"


def scan(
    path: DataPath, options: ReadOptions, *, strict: bool = True, block_bytes: int = BLOCK_BYTES
) -> tuple[Block, ...]:
    """Count the rows of the array, which become one block; reads and parses all of it.

    Raises:
        DataError: E_JSON or E_TEXT at the line where the array is damaged; E_TRUNC, E_CORRUPT or E_BOMB for
            compressed data; E_LINE_TOO_LONG when `strict`.
    """
    rows = size = 0
    for row in _rows(path, options):
        if strict and isinstance(row.value, DataError) and row.value.code == "E_LINE_TOO_LONG":
            raise row.value
        rows, size = rows + 1, size + len(row.data or b"")
    return (Block(0, rows, 0, 0, size),) if rows else ()


def read(path: DataPath, block: Block, options: ReadOptions, first: int = 0) -> Iterator[Document | DataError]:
    """Yield the rows of the array from row `first` on; a bad row is yielded as the error that describes it.

    Raises:
        DataError: as `scan`.
    """
    rows = islice(_rows(path, options), first, block.rows)
    for index, row in enumerate(rows, first):
        result = document(row, path, options)
        yield Document(result.text, options.source, str(path), index) if isinstance(result, Document) else result


def read_objects(path: DataPath, block: Block, options: ReadOptions, first: int = 0) -> Iterator[Row]:
    """Yield the rows of the array from row `first` on, whatever their keys.

    Raises:
        DataError: as `scan`.
    """
    yield from islice(_rows(path, options), first, block.rows)


def is_array(path: DataPath) -> bool:
    """Tell whether a file begins as an array does; a damaged or empty one does not."""
    try:
        lines = (line.data or b"" for line in read_lines(path, 0, 1 << 20, most_bytes=most_text_bytes(path)))
        return next(filter(None, map(bytes.strip, lines)), b"").startswith(b"[")
    except DataError:
        return False


def _rows(path: DataPath, options: ReadOptions) -> Iterator[Row]:
    text = _whole_text(path)
    at = _space(text, 0)
    line = 1 + text.count("\n", 0, at)
    if text[at : at + 1] != "[":
        raise _damaged("the file does not begin with '['", path, line)
    following = _space(text, at + 1)
    if text[following : following + 1] == "]":
        following += 1
    else:
        following = at
        while text[following : following + 1] != "]":
            start = _space(text, following + 1)
            line += text.count("\n", at, start)
            value, end = _value(text, start, path, line)
            yield _row(value, text[start:end].encode(), path, line, options)
            at, following = start, _space(text, end)
            if text[following : following + 1] not in (",", "]"):
                line += text.count("\n", at, following)
                raise _damaged("neither ',' nor ']' after a value", path, line)
        following += 1
    if (end := _space(text, following)) != len(text):
        raise _damaged("text after the end of the array", path, 1 + text.count("\n", 0, end))


def _row(value: Any, data: bytes, path: DataPath, line: int, options: ReadOptions) -> Row:
    if len(data) > options.max_document_bytes:
        fix = "split it, raise max_document_bytes, or set on_bad_row = 'skip'"
        return Row(too_long(path, options.max_document_bytes, line=line, offset=None, fix=fix), line)
    if not isinstance(value, dict | DataError):
        value = not_an_object(value, path, line)
    if isinstance(value, DataError):
        value.row_sha256 = sha256_bytes(data)
    return Row(value, line, None, data)


def _value(text: str, start: int, path: DataPath, line: int) -> tuple[Any, int]:
    """Parse one element and say where it ends; one that only we refuse is returned as its fault."""
    try:
        return DECODER.raw_decode(text, start)
    except RecursionError:
        raise _damaged("nested too deeply", path, line) from None
    except ValueError as error:
        what = f"not valid JSON ({str(error)[:120]})"
        try:
            _, end = _LENIENT.raw_decode(text, start)
        except ValueError:
            raise _damaged(what, path, line) from None
        fix = "mend the row, or set on_bad_row = 'skip'"
        return DataError(what, fix=fix, file=path, line=line, code="E_JSON"), end


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _whole_text(path: DataPath) -> str:
    most = min(_MOST_BYTES, most_text_bytes(path) or _MOST_BYTES)
    parts = list[bytes]()
    for line in read_lines(path, 0, most, most_bytes=most):
        if line.data is None:
            raise _damaged(f"more than {most:,} bytes in one JSON value", path, None)
        parts.append(line.data)
    text = decode_text(b"".join(parts), path, line=None, offset=0)
    if isinstance(text, DataError):
        raise text
    return text


def _damaged(what: str, path: DataPath, line: int | None) -> DataError:
    return DataError(f"not an array of JSON objects: {what}", fix=_FIX, file=path, line=line, code="E_JSON")
