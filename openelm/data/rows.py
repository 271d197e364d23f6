"""Read whole rows, which are objects of any keys, with the place of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from openelm.data.document import BadRow, Block, Row
from openelm.data.manifest import Manifest, Shard, Source, SourceConfig
from openelm.data.readers import READERS
from openelm.data.reading import whole_block
from openelm.data.remote import data_path
from openelm.errors import DataError
from openelm.files.hashes import sha256_bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is."""

    source: Source
    shard: Shard
    row: Row

    def locate(self, error: DataError) -> DataError:
        """Complete an error that is about this row's content."""
        error.file, error.line = data_path(self.shard.path), self.row.line
        if error.row_sha256 is None and self.row.data is not None:
            error.row_sha256 = sha256_bytes(self.row.data)
        return error

    def describe(self, error: DataError) -> BadRow:
        """Say which row was passed over, so that it is found again wherever the data lie."""
        place = {"source": self.source.name, "file": self.shard.name, "line": error.line}
        return {**place, "offset": error.offset, "code": error.code, "sha256": error.row_sha256}


def whole_rows(configs: Sequence[SourceConfig]) -> list[SourceConfig]:
    """Return sources whose files need no text column; make a manifest for `read_rows` of these."""
    return [config.model_copy(update={"text_key": ""}) for config in configs]


def read_rows(manifest: Manifest) -> Iterator[Place]:
    """Yield every row in file order, good and bad: a bad one has a DataError for its value, an empty line None.

    Raises:
        DataError: E_FORMAT for a text file; a damaged or changed file.
    """
    for source in manifest.sources:
        for shard in source.shards:
            for block in _stretches(shard):
                for row in _read_block(source, shard, block):
                    yield Place(source, shard, row)


def _stretches(shard: Shard) -> Iterator[Block]:
    """Join the blocks that are read in one go: one inside a compressed frame costs a reading from the frame's start."""
    by_group = shard.format == "parquet"
    for _, blocks in groupby(shard.blocks, key=lambda block: block.offset if by_group else 0):
        first, *others = blocks
        yield first._replace(rows=first.rows + sum(block.rows for block in others))


def _read_block(source: Source, shard: Shard, block: Block) -> Iterator[Row]:
    reader, path = READERS[shard.format], data_path(shard.path)
    if not hasattr(reader, "read_objects"):
        fix = "give JSON Lines, a JSON array or Parquet"
        raise DataError(f"a {shard.format} file has no rows with keys", fix=fix, file=path, code="E_FORMAT")
    read: Callable[[int], Iterator[Row]] = partial(reader.read_objects, path, block, source.options)
    return whole_block(shard, block, 0, read)
