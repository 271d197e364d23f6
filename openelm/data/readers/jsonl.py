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
    lines = read_lines(path, block.offset, options.max_document_bytes)
    compressed, limit = is_compressed(path), options.max_document_bytes
    skip = block.skip_rows + first
    for row, line in enumerate(islice(lines, skip, block.skip_rows + block.rows), block.first_row + first):
        offset = block.offset + line.offset
        if line.data is None:
            result: Document | DataError = too_long(path, limit, line=row + 1, offset=offset, fix=_TOO_LONG_FIX)
        else:
            result = _parse(line.data, path, row, offset, options)
        if isinstance(result, DataError):
            result.row_sha256 = None if line.data is None else sha256_bytes(line.data)
            if compressed:
                result.offset = None  # it mixes compressed and decompressed bytes; the line says enough
        yield result


def _parse(data: bytes, path: DataPath, row: int, offset: int, options: ReadOptions) -> Document | DataError:
    decoded = decode_text(data, path, line=row + 1, offset=offset)
    if isinstance(decoded, DataError):
        return decoded
    if not decoded.strip():
        return Document("", options.source, str(path), row)
    try:
        value = _DECODER.decode(decoded)
    except RecursionError:
        return _bad_row("not usable JSON: nested too deeply", "E_JSON", path, row)
    except ValueError as error:
        hint = ""
        if decoded[0] == "\ufeff":
            hint = "; it starts with a byte order mark"
        elif row == 0 and decoded.strip() in ("[", "{"):
            hint = "; this file holds one value over many lines, but JSON Lines has one object a line"
        return _bad_row(f"not valid JSON ({str(error)[:120]}){hint}", "E_JSON", path, row)
    if not isinstance(value, dict):
        return _bad_row(f"a JSON {_kind(value)}, but each line must be an object", "E_SCHEMA", path, row)
    if options.text_key not in value:
        keys = ", ".join(repr(key[:40]) for key in list(value)[:12]) or "none"
        return _bad_row(f"no key {options.text_key!r}; keys present: {keys}", "E_SCHEMA", path, row)
    text = value[options.text_key]
    if not isinstance(text, str):
        what = f"key {options.text_key!r} holds a JSON {_kind(text)}, but must hold a string"
        return _bad_row(what, "E_SCHEMA", path, row)
    if "\0" in text:
        return bad_text("the text holds a NUL character", path, row + 1, offset)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"the text holds a lone surrogate \\u{ord(text[error.start]):04x} at character {error.start}"
        return bad_text(what, path, row + 1, offset)
    return Document(text, options.source, str(path), row)


def _bad_row(what: str, code: str, path: DataPath, row: int) -> DataError:
    fix = "mend the line, or set on_bad_row = 'skip'"
    return DataError(what, fix=fix, file=path, line=row + 1, code=code)


def _kind(value: Any) -> str:
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


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
