"""Read documents: in file order, or at a lane's position a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal, TypeVar

from openelm.data.document import BadRow, Block, Document, Drops, add_drops
from openelm.data.filters import character_filter
from openelm.data.lanes import DocumentOrder, Position
from openelm.data.manifest import Manifest, Shard, Source, SourceConfig, build_manifest, unreadable
from openelm.data.readers import READERS
from openelm.data.remote import data_path
from openelm.data.retry import wait_to_retry
from openelm.errors import DataError

T = TypeVar("T")


def read_documents(
    sources: Manifest | Sequence[SourceConfig],
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    drops: Drops | None = None,
) -> Iterator[Document]:
    """Yield every document in file order, for tokenizer training and evaluation; empty ones are dropped.

    Args:
        drops: filled in place with what was dropped (source, reason, number).

    Raises:
        DataError: a damaged or changed file; a bad row when `on_bad_row` is "error".
    """
    manifest = sources if isinstance(sources, Manifest) else build_manifest(sources, on_bad_row=on_bad_row)
    for source in manifest.sources:
        for shard in source.shards:
            for block in shard.blocks:
                for row in read_block(source, shard, block):
                    reason = reason_to_drop(row, on_bad_row)
                    if reason is None:
                        assert isinstance(row, Document)
                        yield row
                    elif drops is not None:
                        add_drops(drops, {source.name: {reason: 1}})


def reason_to_drop(row: Document | DataError, on_bad_row: str, min_characters: int = 0) -> str | None:
    """Name why a row is not used, or None; a bad row's reason is its error code.

    Raises:
        DataError: the row is bad and the policy is "error".
    """
    if isinstance(row, DataError):
        if on_bad_row == "error":
            raise row
        return row.code
    return character_filter(row.text, min_characters)


def read_block(source: Source, shard: Shard, block: Block, first: int = 0) -> Iterator[Document | DataError]:
    """Yield a block's rows from its row `first` on, exactly as many as the manifest says.

    Raises:
        DataError: as `whole_block`.
    """
    path, read = data_path(shard.path), READERS[shard.format].read
    return whole_block(shard, block, first, lambda row: read(path, block, source.options, row))


def whole_block(shard: Shard, block: Block, first: int, read: Callable[[int], Iterator[T]]) -> Iterator[T]:
    """Yield what `read` yields from a block's row `first` on, and hold it to the number of rows in the manifest.

    After an I/O error that may pass it goes on with the row it was at, up to three tries.

    Raises:
        DataError: E_CHANGED when the file differs from the manifest; what the format's reader raises.
    """
    shard.check_unchanged()
    path, count, failures = data_path(shard.path), first, 0
    while True:
        try:
            for row in read(count):
                yield row
                count += 1
            break
        except OSError as error:
            failures += 1
            if not wait_to_retry(error, failures):
                raise unreadable(path, error) from None
    if count != block.rows:
        what = f"the block at row {block.first_row} has {count} rows, but the manifest says {block.rows}"
        raise DataError(what, fix="build the manifest again", file=path, code="E_CHANGED")


class SourceReader:
    """One lane's view of one source: the row at any position, cheap when positions follow each other."""

    def __init__(self, order: DocumentOrder, lane: int) -> None:
        self.source, self._order, self._lane = order.source, order, lane
        self.rows = order.source.rows
        self._names: dict[str, str] = {}  # of the shards, by their paths; made when there is a bad row
        self._loaded: Position | None = None  # the start of the slice in memory
        self._rows: list[Document | DataError] = []
        self._open: list[Iterator[Document | DataError]] = []

    def row(self, position: Position) -> tuple[Document | DataError, Position]:
        """Return the first row at or after a position, and where it is.

        Raises:
            DataError: the file is damaged, changed or gone.
        """
        while True:
            start = Position(position.epoch, position.window, position.slice)
            if start != self._loaded:
                self._load(start)
            if position.index < len(self._rows):
                return self._rows[position.index], position
            position = self._order.next_slice(self._lane, start)

    def describe(self, error: DataError) -> BadRow:
        """Say which row was passed over, so that it is found again wherever the data lie."""
        self._names = self._names or {shard.path: shard.name for shard in self.source.shards}
        place = {"source": self.source.name, "file": self._names[str(error.file)], "line": error.line}
        return {**place, "offset": error.offset, "code": error.code, "sha256": error.row_sha256}

    def _load(self, start: Position) -> None:
        follows = self._loaded is not None and start == Position(
            self._loaded.epoch, self._loaded.window, self._loaded.slice + 1
        )
        self._rows, self._loaded = [], None
        stretches = self._order.stretches(self._lane, start)
        if not follows:
            self._open = [
                read_block(self.source, self.source.shards[part.shard], part.block, part.first) for part in stretches
            ]
        rows: list[Document | DataError] = []
        for part, opened in zip(stretches, self._open, strict=True):
            last = part.first + part.rows == part.block.rows
            rows.extend(opened if last else islice(opened, part.rows))
        self._rows = [rows[place] for place in self._order.places(self._lane, start, len(rows))]
        self._loaded = start
