"""Parquet, read a batch at a time: one string column, or whole rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from openelm.data.document import BLOCK_BYTES, Block, Document, ReadOptions, Row, bad_text, decode_text, too_long
from openelm.data.remote import DataPath, Url
from openelm.data.retry import may_pass
from openelm.errors import DataError
from openelm.files.hashes import sha256_bytes

_BLOCKS_PER_GROUP = 16  # reaching a block inside a row group decodes the rows before it
_BATCH_ROWS = 64
_REPAIR = "fetch or write the file again"


def scan(
    path: DataPath, options: ReadOptions, *, strict: bool = True, block_bytes: int = BLOCK_BYTES
) -> tuple[Block, ...]:
    """Cut a file into blocks by its row groups; reads the footer only.

    Raises:
        DataError: E_SCHEMA naming the columns present; E_TRUNC or E_CORRUPT for a damaged file.
    """
    with _faults(path):
        file = _open(path)
        if options.text_key:
            _check_schema(file, path, options.text_key)
        metadata = file.metadata
        blocks, first = [], 0
        for group in range(metadata.num_row_groups):
            # Of all columns: asking for one ends the process when a damaged footer contradicts itself.
            rows, size = metadata.row_group(group).num_rows, metadata.row_group(group).total_byte_size
            if rows < 0:
                raise ValueError(f"row group {group} has {rows} rows")
            parts = min(rows, _BLOCKS_PER_GROUP)
            for start, stop in pairwise(rows * part // max(1, parts) for part in range(parts + 1)):
                share = max(0, size) * (stop - start) // rows
                blocks.append(Block(first + start, stop - start, group, start, share))
            first += rows
        return tuple(blocks)


def read(path: DataPath, block: Block, options: ReadOptions, first: int = 0) -> Iterator[Document | DataError]:
    """Yield the rows of a block from its row `first` on; a bad row is yielded as the error that describes it.

    Raises:
        DataError: E_SCHEMA, E_TRUNC or E_CORRUPT when the file itself cannot be read.
    """
    pyarrow = _pyarrow()
    skip, left, row = block.skip_rows + first, block.rows - first, block.first_row + first
    with _faults(path):
        file = _open(path)
        _check_schema(file, path, options.text_key)
        batches = file.iter_batches(
            _BATCH_ROWS, row_groups=[block.offset], columns=[options.text_key], use_threads=False
        )
    while left > 0:
        with _faults(path):
            batch = next(batches, None)
            if batch is None:
                return
            values = batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary())
            rows = values[skip : skip + left].to_pylist()
            skip = max(0, skip - len(values))
        for value in rows:
            result = _document(value, path, row, options)
            if isinstance(result, DataError) and value is not None:
                result.row_sha256 = sha256_bytes(value)
            yield result
            row += 1
        left -= len(rows)


def read_objects(path: DataPath, block: Block, options: ReadOptions, first: int = 0) -> Iterator[Row]:
    """Yield the rows of a block from its row `first` on, with all columns.

    Raises:
        DataError: E_TRUNC or E_CORRUPT when the file itself cannot be read.
    """
    skip, left, row = block.skip_rows + first, block.rows - first, block.first_row + first
    with _faults(path):
        batches = _open(path).iter_batches(_BATCH_ROWS, row_groups=[block.offset], use_threads=False)
    while left > 0:
        with _faults(path):
            batch = next(batches, None)
        if batch is None:
            return
        part = batch.slice(skip, left) if skip < batch.num_rows else batch.slice(0, 0)
        skip = max(0, skip - batch.num_rows)
        for value in _objects(part):
            row, left = row + 1, left - 1
            yield Row(bad_text("a string is not UTF-8", path, row) if value is None else value, row)


def _objects(batch: Any) -> list[dict[str, Any] | None]:
    """Make objects of a batch's rows; None for one with a string that is not UTF-8, which the cast of all refuses."""
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for index in range(batch.num_rows) for row in _objects(batch.slice(index, 1))]


def _document(value: bytes | None, path: DataPath, row: int, options: ReadOptions) -> Document | DataError:
    fix = "mend the row, or set on_bad_row = 'skip'"
    if value is None:
        what = f"row {row}: column {options.text_key!r} holds null, but must hold a string"
        return DataError(what, fix=fix, file=path, line=row + 1, code="E_SCHEMA")
    if len(value) > options.max_document_bytes:
        return too_long(path, options.max_document_bytes, line=row + 1, offset=None, fix=fix)
    text = decode_text(value, path, line=row + 1, offset=0)
    if isinstance(text, DataError):
        text.offset = None  # it would count from the row's start, not the file's
        return text
    return Document(text, options.source, str(path), row)


def _open(path: DataPath) -> Any:
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(0, path.stat().st_size - 4))
        tail = file.read(4)
    if head == b"PAR1" != tail:
        what = "the Parquet footer is missing: the file is cut short, and no row can be read"
        raise DataError(what, fix=_REPAIR, file=path, offset=path.stat().st_size, code="E_TRUNC")
    opened = path.open("rb") if isinstance(path, Url) else path
    return _pyarrow().parquet.ParquetFile(opened, page_checksum_verification=True, pre_buffer=False)


def _pyarrow() -> Any:
    import pyarrow.parquet  # here, because it takes long to load and few runs read Parquet

    return pyarrow


def _check_schema(file: Any, path: DataPath, key: str) -> None:
    pyarrow = _pyarrow()
    schema = file.schema_arrow
    present = ", ".join(f"{field.name} ({field.type})" for field in schema)[:400]
    if schema.names.count(key) != 1:
        what = f"no single column {key!r}; columns present: {present or 'none'}"
        raise DataError(what, fix="set text_key to the column with the text", file=path, code="E_SCHEMA")
    kind = schema.field(key).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if value not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        what = f"column {key!r} holds {kind}, but must hold strings; columns present: {present}"
        raise DataError(what, fix="set text_key to the column with the text", file=path, code="E_SCHEMA")


@contextlib.contextmanager
def _faults(path: DataPath) -> Iterator[None]:
    pyarrow = _pyarrow()
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and may_pass(error):
            raise
        what = f"not a readable Parquet file ({str(error)[:160]})"
        raise DataError(what, fix=_REPAIR, file=path, code="E_CORRUPT") from None
