"""Which files a run reads: names, sizes, SHA-256, rows, blocks; its hash names the data wherever it lies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from openelm.config import Config
from openelm.data.document import BLOCK_BYTES, MAX_DOCUMENT_BYTES, Block, ReadOptions
from openelm.data.paths import expand_paths
from openelm.data.readers import READERS, format_of
from openelm.errors import ConfigError, DataError
from openelm.files import canonical_json, sha256_bytes, sha256_file


class SourceConfig(Config):
    """One named body of text: where its files are and how they become documents."""

    name: str = Field(min_length=1)
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders (walked to their depth) and globs."""
    exclude: tuple[str, ...] = ()
    """Globs of file names to leave out, such as held-out files."""
    format: Literal["auto", "txt", "jsonl", "parquet"] = "auto"
    text_key: str = "text"
    """The JSON key or Parquet column that holds the text."""
    weight: PositiveFloat = 1.0
    """This source's share of the training tokens, relative to the other sources' weights."""
    document_bytes: PositiveInt | None = None
    """Cut a txt file at the first blank line after this many bytes; None: one file is one document."""
    max_document_bytes: PositiveInt = MAX_DOCUMENT_BYTES


@dataclass(frozen=True, slots=True)
class Shard:
    """One data file; `name` is relative to what the recipe listed, `path` is where it lies now."""

    path: str
    name: str
    format: str
    bytes: int
    modified_ns: int
    sha256: str
    rows: int
    blocks: tuple[Block, ...]

    def check_unchanged(self, *, whole: bool = False) -> None:
        """Compare the file with the manifest: size and time of change, and its SHA-256 if either differs.

        Args:
            whole: hash the file in any case.

        Raises:
            DataError: E_CHANGED with both hashes, or when the file is gone.
        """
        path = Path(self.path)
        try:
            status = path.stat()
            if not whole and (status.st_size, status.st_mtime_ns) == (self.bytes, self.modified_ns):
                return
            found = _hash(path, status.st_size, status.st_mtime_ns) if not whole else sha256_file(path)
        except OSError as error:
            raise unreadable(path, error) from None
        if found != self.sha256:
            raise DataError(
                f"the file changed since the manifest was made: SHA-256 {found}, expected {self.sha256}",
                fix="put the old file back, or start a new run with a new manifest",
                file=path,
                code="E_CHANGED",
            )


@dataclass(frozen=True, slots=True)
class Source:
    """The shards of one source and the settings that decide its documents."""

    name: str
    shards: tuple[Shard, ...]
    weight: float = 1.0
    text_key: str = "text"
    document_bytes: int | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    @property
    def rows(self) -> int:
        """Count the rows of all shards, good and bad."""
        return sum(shard.rows for shard in self.shards)

    @property
    def options(self) -> ReadOptions:
        """Say how readers turn this source's files into documents."""
        return ReadOptions(self.name, self.text_key, self.document_bytes, self.max_document_bytes)


@dataclass(frozen=True)
class Manifest:
    """Every file a run reads."""

    sources: tuple[Source, ...]

    @functools.cached_property
    def sha256(self) -> str:
        """Hash what decides the documents: not the folders the files lie in, nor when they were written."""
        value = self.to_json()
        for source in value["sources"]:
            for shard in source["shards"]:
                del shard["path"], shard["modified_ns"]
        return sha256_bytes(canonical_json(value))

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `from_json` turns into an equal manifest."""
        return {"sources": [_source_json(source) for source in self.sources]}

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """Rebuild a manifest from plain data.

        Raises:
            DataError: the data is not a manifest.
        """
        try:
            return cls(tuple(_source(source) for source in value["sources"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            fix = "build the manifest again"
            raise DataError(f"not a data manifest ({type(error).__name__}: {error})", fix=fix) from None

    def check_unchanged(self, *, whole: bool = False) -> None:
        """Check every file; cheap unless files were moved or `whole` asks to hash all of them.

        Raises:
            DataError: E_CHANGED for the first file that differs.
        """
        for source in self.sources:
            for shard in source.shards:
                shard.check_unchanged(whole=whole)


def _source_json(source: Source) -> dict[str, Any]:
    value = asdict(source)
    for shard, original in zip(value["shards"], source.shards, strict=True):
        shard["blocks"] = [list(astuple(block)) for block in original.blocks]
    return value


def _source(value: dict[str, Any]) -> Source:
    shards = tuple(
        Shard(**{**shard, "blocks": tuple(Block(*map(int, block)) for block in shard["blocks"])})
        for shard in value["shards"]
    )
    return Source(**{**value, "shards": shards})


_hash: Callable[[Path, int, int], str] = functools.lru_cache(maxsize=1 << 16)(
    lambda path, size_bytes, modified_ns: sha256_file(path)
)


_SETTINGS = ("name", "weight", "text_key", "document_bytes", "max_document_bytes")


def build_manifest(
    configs: Sequence[SourceConfig],
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    block_bytes: int = BLOCK_BYTES,
) -> Manifest:
    """Find, hash and scan every file of every source.

    Args:
        on_bad_row: "skip" lets a row over the source's size limit pass; reading then counts it as dropped.
        block_bytes: about how much of a large file one block holds.

    Raises:
        ConfigError: two sources share a name.
        DataError: E_PATH, E_FORMAT, E_EMPTY; and what `scan` of the format finds (E_TRUNC, E_SCHEMA, …).
    """
    names = [config.name for config in configs]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"sources must have different names (given: {', '.join(names) or 'no source'})")
    sources = []
    for config in configs:
        options = ReadOptions(config.name, config.text_key, config.document_bytes, config.max_document_bytes)
        strict = on_bad_row == "error"
        shards = tuple(
            _scan(name, path, config.format, options, strict, block_bytes)
            for name, path in expand_paths(config.paths, config.exclude)
        )
        settings = {name: getattr(config, name) for name in _SETTINGS}
        source = Source(shards=shards, **settings)
        if not source.rows:
            what = f"source {config.name!r} is empty: {len(shards)} files hold no text"
            raise DataError(what, fix="give files with text", file=", ".join(config.paths), code="E_EMPTY")
        sources.append(source)
    return Manifest(tuple(sources))


def _scan(name: str, path: Path, kind: str, options: ReadOptions, strict: bool, block_bytes: int) -> Shard:
    kind = format_of(path) if kind == "auto" else kind
    try:
        before = path.stat()
        digest = sha256_file(path)
        blocks = READERS[kind].scan(path, options, strict=strict, block_bytes=block_bytes)
        after = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        fix = "wait until it is complete"
        raise DataError("the file is being written to", fix=fix, file=path, code="E_CHANGED")
    rows = sum(block.rows for block in blocks)
    return Shard(str(path), name, kind, after.st_size, after.st_mtime_ns, digest, rows, blocks)


def unreadable(path: Path, error: OSError) -> DataError:
    """Describe a data file that the system cannot open or read."""
    code = "E_CHANGED" if isinstance(error, FileNotFoundError) else "E_READ"
    what = f"cannot read the file: {error.strerror or type(error).__name__}"
    return DataError(what, fix="check that it exists and may be read", file=path, code=code)
