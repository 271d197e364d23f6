"""Which files a run reads: names, sizes, SHA-256, rows, blocks; its hash names the data wherever it lies."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from openelm.config import Config
from openelm.data.blocks import Blocks
from openelm.data.document import BLOCK_BYTES, MAX_DOCUMENT_BYTES, ReadOptions
from openelm.data.paths import expand_paths
from openelm.data.readers import READERS, format_of, look_inside
from openelm.data.remote import DataPath, Url, data_path, local_copy
from openelm.data.retry import retried
from openelm.errors import ConfigError, DataError
from openelm.files.hashes import canonical_json, sha256_file

State = tuple[int, int, str]  # bytes, time of change, version
_ASKING_THREADS = 16


class SourceConfig(Config):
    """One named body of text: where its files are and how they become documents."""

    name: str = Field(min_length=1)
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders (walked to their depth) and globs."""
    exclude: tuple[str, ...] = ()
    """Globs of file names to leave out, such as held-out files."""
    format: Literal["auto", "txt", "jsonl", "json", "parquet"] = "auto"
    """`json`: a file that is one array; `auto` goes by the suffix, and looks into a .json file."""
    text_key: str = "text"
    """The JSON key or Parquet column that holds the text; empty for rows that are read whole."""
    weight: PositiveFloat = 1.0
    """This source's share of the training tokens, relative to the other sources' weights."""
    document_bytes: PositiveInt | None = None
    """Cut a txt file at the first blank line after this many bytes; None: one file is one document."""
    max_document_bytes: PositiveInt = MAX_DOCUMENT_BYTES

    def source(self, shards: tuple[Shard, ...] = ()) -> Source:
        """Return the source of these settings and files."""
        return Source(self.name, shards, **{name: getattr(self, name) for name in _SETTINGS})


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
    blocks: Blocks
    version: str = ""
    """Behind a URL: what the store calls this content, its ETag or time of change."""

    @property
    def state(self) -> State:
        """What `file_state` said of the file when the manifest was made."""
        return self.bytes, self.modified_ns, self.version

    def check_unchanged(self, *, whole: bool = False) -> None:
        """Compare the file with the manifest: size and time of change, and its SHA-256 if either differs.

        Args:
            whole: hash the file in any case.

        Raises:
            DataError: E_CHANGED with both hashes, or when the file is gone.
        """
        path = data_path(self.path)
        try:
            state = file_state(path)
            if not whole and state == self.state:
                return
            found = retried(lambda: _sha256(path) if whole else _remembered_sha256(path, *state))
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
        digest = hashlib.sha256(b"{")
        for piece in encode_sources(
            (source_json(source), map(_content_json, source.shards)) for source in self.sources
        ):
            digest.update(piece)
        digest.update(b"}")
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return the hash, and of each source what people want to know at a glance, as plain data."""
        sources = [
            {
                "name": source.name,
                "files": len(source.shards),
                "rows": source.rows,
                "bytes": sum(shard.bytes for shard in source.shards),
                "weight": source.weight,
            }
            for source in self.sources
        ]
        return {"sha256": self.sha256, "sources": sources}

    def check_unchanged(self, *, whole: bool = False) -> None:
        """Check every file; cheap unless files were moved or `whole` asks to hash all of them.

        Raises:
            DataError: E_CHANGED for the first file that differs.
        """
        shards = [shard for source in self.sources for shard in source.shards]
        with ThreadPoolExecutor(_ASKING_THREADS) as threads:
            list(threads.map(lambda shard: shard.check_unchanged(whole=whole), shards))  # the first error in list order


def source_json(source: Source) -> dict[str, Any]:
    """Return a source's name and settings as plain data, without its shards."""
    return {**{name: getattr(source, name) for name in ("name", *_SETTINGS)}, "shards": []}


def encode_sources(sources: Iterable[tuple[Mapping[str, Any], Iterable[Mapping[str, Any]]]]) -> Iterator[bytes]:
    """Encode `"sources":[…]` as canonical JSON, a shard at a time: the text of all blocks is large.

    Args:
        sources: plain data with one empty list of shards in it, and the shards that belong there.
    """
    yield b'"sources":['
    for number, (source, shards) in enumerate(sources):
        before, after = canonical_json(source).split(b'"shards":[]')  # a quote inside a text has a backslash before it
        yield (b"," if number else b"") + before + b'"shards":['
        for at, shard in enumerate(shards):
            yield (b"," if at else b"") + canonical_json(shard)
        yield b"]" + after
    yield b"]"


def shard_json(shard: Shard) -> dict[str, Any]:
    """Return plain data that `shard_from_json` turns into an equal shard."""
    value = {name: getattr(shard, name) for name in Shard.__slots__}
    return {**value, "blocks": shard.blocks.to_json()}


def _content_json(shard: Shard) -> dict[str, Any]:
    left_out = ("path", "modified_ns", "version")
    return {name: value for name, value in shard_json(shard).items() if name not in left_out}


def shard_from_json(value: dict[str, Any]) -> Shard:
    """Rebuild a shard from plain data.

    Raises:
        ValueError: it is none.
    """
    check_kinds(value, _SHARD_KINDS)
    shard = Shard(**{**value, "blocks": Blocks(value["blocks"])})
    if shard.rows != shard.blocks.rows or "\0" in shard.path:
        raise ValueError(f"{shard.rows} rows in blocks of {shard.blocks.rows}, or no path: {shard.path[:80]!r}")
    return shard


def source_from_json(value: dict[str, Any], shards: Iterable[Shard]) -> Source:
    """Rebuild a source from plain data and its shards.

    Raises:
        ValueError: it is none.
    """
    check_kinds(value, _SOURCE_KINDS)
    if not 0 < value["weight"] < math.inf:
        raise ValueError(f"weight {value['weight']}")
    return Source(**{**value, "shards": tuple(shards)})


def check_kinds(value: Any, kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Hold plain data to the names and the types of its values.

    Raises:
        ValueError: names the first that is missing, unknown or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, where an object is expected")
    for name in sorted({*value, *kinds}):
        if name not in kinds or type(value.get(name, ...)) not in kinds[name]:
            given = type(value[name]).__name__ if name in value else "nothing"
            raise ValueError(f"{name[:40]!r} is {given}")


_SHARD_KINDS = {
    **dict.fromkeys(("path", "name", "format", "sha256", "version"), (str,)),
    **dict.fromkeys(("bytes", "modified_ns", "rows"), (int,)),
    "blocks": (list,),
}
_SOURCE_KINDS = {
    **dict.fromkeys(("name", "text_key"), (str,)),
    **{"weight": (float, int), "document_bytes": (int, type(None)), "max_document_bytes": (int,), "shards": (list,)},
}


def file_state(path: DataPath) -> State:
    """Return size, time of change and version: what tells cheaply that a file is the same.

    Raises:
        DataError: the file is gone or may not be read.
    """
    try:
        status: Any = retried(path.stat)  # of a file or of a URL
    except OSError as error:
        raise unreadable(path, error) from None
    return status.st_size, status.st_mtime_ns, getattr(status, "version", "")


def file_states(paths: Sequence[DataPath]) -> list[State]:
    """Return the state of each file; many are asked for at once, because a store takes its time to answer.

    Raises:
        DataError: the first file that is gone or may not be read.
    """
    with ThreadPoolExecutor(_ASKING_THREADS) as threads:
        return list(threads.map(file_state, paths))


def _sha256(path: DataPath) -> str:
    return path.sha256() if isinstance(path, Url) else sha256_file(path)


_remembered_sha256: Callable[[DataPath, int, int, str], str] = functools.lru_cache(maxsize=1 << 16)(
    lambda path, size_bytes, modified_ns, version: _sha256(path)
)


_SETTINGS = ("weight", "text_key", "document_bytes", "max_document_bytes")


def build_manifest(
    configs: Sequence[SourceConfig],
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    block_bytes: int = BLOCK_BYTES,
    known: Mapping[str, Sequence[Shard]] = MappingProxyType({}),
) -> Manifest:
    """Find, hash and scan every file of every source.

    Args:
        on_bad_row: "skip" lets a row over the source's size limit pass; reading then counts it as dropped.
        block_bytes: about how much of a large file one block holds.
        known: by source, what an earlier scan with the same settings found; files that did not change since are
            taken from there.

    Raises:
        ConfigError: two sources share a name.
        DataError: E_PATH, E_FORMAT, E_EMPTY; and what `scan` of the format finds (E_TRUNC, E_SCHEMA, …).
    """
    names = [config.name for config in configs]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"sources must have different names (given: {', '.join(names) or 'no source'})")
    sources = []
    for config in configs:
        options = config.source().options
        strict = on_bad_row == "error"
        files = expand_paths(config.paths, config.exclude)
        unchanged = _unchanged(files, known.get(config.name, ()))
        shards = tuple(
            unchanged.get(path)
            or scan_shard(name, path, config.format, options, strict=strict, block_bytes=block_bytes)
            for name, path in files
        )
        source = config.source(shards)
        if not source.rows:
            what = f"source {config.name!r} is empty: {len(shards)} files hold no text"
            raise DataError(what, fix="give files with text", file=", ".join(config.paths), code="E_EMPTY")
        sources.append(source)
    return Manifest(tuple(sources))


def _unchanged(files: Sequence[tuple[str, DataPath]], known: Sequence[Shard]) -> dict[DataPath, Shard]:
    """Find the files whose place, name, size, time of change and version are those of a known entry."""
    entries = {(shard.name, shard.path): shard for shard in known}
    asked = [(path, entries[name, str(path)]) for name, path in files if (name, str(path)) in entries]
    states = file_states([path for path, _ in asked])
    pairs = zip(asked, states, strict=True)
    # A store that gives neither time nor version says nothing about the content.
    return {path: shard for (path, shard), state in pairs if state == shard.state and any(state[1:])}


def scan_shard(
    name: str, path: DataPath, kind: str, options: ReadOptions, *, strict: bool, block_bytes: int = BLOCK_BYTES
) -> Shard:
    """Hash one file and cut it into blocks; what is behind a URL is fetched once, into a temporary file.

    Args:
        kind: the format, or "auto" for the suffix's.
        strict: refuse a row over the size limit here.

    Raises:
        DataError: E_FORMAT, E_READ, E_CHANGED; and what `scan` of the format finds (E_TRUNC, E_SCHEMA, …).
    """
    named = format_of(path) if kind == "auto" else kind

    def scan() -> tuple[str, str, Blocks]:
        with local_copy(path) if isinstance(path, Url) else contextlib.nullcontext(path) as local:
            found = look_inside(local, named) if kind == "auto" else named
            try:
                blocks = Blocks(READERS[found].scan(local, options, strict=strict, block_bytes=block_bytes))
            except DataError as error:
                raise error if local == path else _about(path, error) from None
            return found, sha256_file(local), blocks

    try:
        before = file_state(path)
        found, digest, blocks = retried(scan)
        after = file_state(path)
    except OSError as error:
        raise unreadable(path, error) from None
    if before != after:
        fix = "wait until it is complete"
        raise DataError("the file is being written to", fix=fix, file=path, code="E_CHANGED")
    size, modified_ns, version = after
    return Shard(str(path), name, found, size, modified_ns, digest, blocks.rows, blocks, version)


def _about(path: DataPath, error: DataError) -> DataError:
    return DataError(error.what, fix=error.fix, file=path, line=error.line, offset=error.offset, code=error.code)


def unreadable(path: DataPath, error: OSError) -> DataError:
    """Describe a data file that the system cannot open or read."""
    code = "E_CHANGED" if isinstance(error, FileNotFoundError) else "E_READ"
    what = f"cannot read the file: {error.strerror or type(error).__name__}"
    return DataError(what, fix="check that it exists and may be read", file=path, code=code)
