"""JSON Lines, one object a line, plain or compressed with gzip or Zstandard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, NoReturn

from openelm.data.document import (
    BLOCK_BYTES,
    BLOCKS_PER_FILE,
    Block,
    Document,
    ReadOptions,
    Row,
    bad_text,
    decode_text,
    too_long,
)
from openelm.data.readers.lines import Line, is_compressed, most_text_bytes, read_lines
from openelm.data.remote import DataPath
from openelm.errors import DataError
from openelm.files.hashes import sha256_bytes

# A block inside a frame is reached by decompressing the frame from its start: k blocks cost k/2 readings.
_BLOCKS_PER_FRAME = 16
_MOST_STARTS = 1 << 16
_TOO_LONG_FIX = "split the document, raise max_document_bytes, or set on_bad_row = 'skip'"


def scan(
    path: DataPath, options: ReadOptions, *, strict: bool = True, block_bytes: int = BLOCK_BYTES
) -> tuple[Block, ...]:
    """Cut a file into blocks; reads all of it but parses nothing.

    Raises:
        DataError: E_TRUNC, E_CORRUPT or E_BOMB for compressed data; E_LINE_TOO_LONG when `strict`.
    """
    target = min(block_bytes, path.stat().st_size // BLOCKS_PER_FILE)
    starts: list[tuple[int, Line]] = []
    row, end = -1, 0
    lines = read_lines(path, 0, options.max_document_bytes, most_bytes=most_text_bytes(path))
    for row, line in enumerate(lines):
        if line.data is None and strict:
            limit = options.max_document_bytes
            raise too_long(path, limit, line=row + 1, offset=line.offset, fix=_TOO_LONG_FIX)
        if not starts or line.offset - starts[-1][1].offset >= target:
            starts.append((row, line._replace(data=None)))
            if len(starts) > _MOST_STARTS:  # a file that unpacks to far more than its size
                starts, target = starts[::2], max(1, 2 * target)
        end = line.offset + (options.max_document_bytes if line.data is None else len(line.data))
    if not starts:
        return ()
    compressed = is_compressed(path)
    if compressed:
        starts = _thin(starts)
    blocks = []
    for (first, line), following in zip(starts, [*starts[1:], None], strict=True):
        next_row, next_offset = (following[0], following[1].offset) if following else (row + 1, end)
        place = (line.frame, line.skip) if compressed else (line.offset, 0)
        blocks.append(Block(first, next_row - first, *place, next_offset - line.offset))
    return tuple(blocks)


def _thin(starts: list[tuple[int, Line]]) -> list[tuple[int, Line]]:
    frames: dict[int, list[tuple[int, Line]]] = {}
    for start in starts:
        frames.setdefault(start[1].frame, []).append(start)
    return [start for inside in frames.values() for start in inside[:: -(-len(inside) // _BLOCKS_PER_FRAME)]]


def read(path: DataPath, block: Block, options: ReadOptions, first: int = 0) -> Iterator[Document | DataError]:
    """Yield the rows of a block from its row `first` on; a bad row is yielded as the error that describes it.

    Raises:
        DataError: E_TRUNC or E_CORRUPT for compressed data.
    """
    for row in read_objects(path, block, options, first):
        yield document(row, path, options)


def read_objects(path: DataPath, block: Block, options: ReadOptions, first: int = 0) -> Iterator[Row]:
    """Yield the rows of a block from its row `first` on, whatever their keys.

    Raises:
        DataError: E_TRUNC or E_CORRUPT for compressed data.
    """
    lines = read_lines(path, block.offset, options.max_document_bytes)
    compressed, limit = is_compressed(path), options.max_document_bytes
    skip = block.skip_rows + first
    for row, line in enumerate(islice(lines, skip, block.skip_rows + block.rows), block.first_row + first):
        # Of a compressed file it would mix compressed and decompressed bytes; the line says enough.
        offset = None if compressed else block.offset + line.offset
        if line.data is None:
            value: Any = too_long(path, limit, line=row + 1, offset=offset, fix=_TOO_LONG_FIX)
        else:
            value = _parse(line.data, path, row, offset)
            if isinstance(value, DataError):
                value.row_sha256 = sha256_bytes(line.data)
        yield Row(value, row + 1, offset, line.data)


def document(row: Row, path: DataPath, options: ReadOptions) -> Document | DataError:
    """Take the text out of a row; its fault is returned, as a value, if it has none."""
    if isinstance(row.value, DataError):
        return row.value
    text = _text("" if row.value is None else row.value, path, row, options.text_key)
    if isinstance(text, DataError):
        text.row_sha256 = None if row.data is None else sha256_bytes(row.data)
        return text
    return Document(text, options.source, str(path), row.line - 1)


def _text(value: dict[str, Any] | str, path: DataPath, row: Row, key: str) -> str | DataError:
    if isinstance(value, str):
        return value
    if key not in value:
        keys = ", ".join(repr(key[:40]) for key in list(value)[:12]) or "none"
        return _bad_row(f"no key {key!r}; keys present: {keys}", "E_SCHEMA", path, row.line)
    text = value[key]
    if not isinstance(text, str):
        what = f"key {key!r} holds a JSON {json_kind(text)}, but must hold a string"
        return _bad_row(what, "E_SCHEMA", path, row.line)
    if fault := fault_of_text(text):
        return bad_text(fault, path, row.line, row.offset)
    return text


def fault_of_text(text: str) -> str | None:
    """Say what makes a string one that no text file holds, or None."""
    if "\0" in text:
        return "the text holds a NUL character"
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the text holds a lone surrogate \\u{ord(text[error.start]):04x} at character {error.start}"
    return None


def _parse(data: bytes, path: DataPath, row: int, offset: int | None) -> dict[str, Any] | DataError | None:
    decoded = decode_text(data, path, line=row + 1, offset=offset or 0)
    if isinstance(decoded, DataError):
        decoded.offset = None if offset is None else decoded.offset
        return decoded
    if not decoded.strip():
        return None
    try:
        value = DECODER.decode(decoded)
    except RecursionError:
        return _bad_row("not usable JSON: nested too deeply", "E_JSON", path, row + 1)
    except ValueError as error:
        hint = ""
        if decoded[0] == "\ufeff":
            hint = "; it starts with a byte order mark"
        elif row == 0 and decoded.strip() in ("[", "{"):
            hint = "; this file holds one value over many lines, but JSON Lines has one object a line"
        return _bad_row(f"not valid JSON ({str(error)[:120]}){hint}", "E_JSON", path, row + 1)
    return value if isinstance(value, dict) else not_an_object(value, path, row + 1)


def not_an_object(value: Any, path: DataPath, line: int) -> DataError:
    """Describe a row that is some other JSON value."""
    return _bad_row(f"a JSON {json_kind(value)}, but each row must be an object", "E_SCHEMA", path, line)


def _bad_row(what: str, code: str, path: DataPath, line: int) -> DataError:
    fix = "mend the line, or set on_bad_row = 'skip'"
    return DataError(what, fix=fix, file=path, line=line, code=code)


def json_kind(value: Any) -> str:
    """Name the kind of a JSON value."""
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)[:40]!r}")
    return result


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
