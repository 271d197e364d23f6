"""Manifest files: what one or many machines found of a source, with the file's own hash; parts and their merging."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from openelm.data.document import BLOCK_BYTES
from openelm.data.manifest import (
    Manifest,
    Shard,
    Source,
    SourceConfig,
    build_manifest,
    check_kinds,
    encode_sources,
    shard_from_json,
    shard_json,
    source_from_json,
    source_json,
)
from openelm.data.remote import is_url
from openelm.errors import ConfigError, DataError
from openelm.files.atomic import replacing
from openelm.files.hashes import canonical_json, sha256_bytes

VERSION = 1
_KIND = "openelm data manifest"
_HEAD, _HASH_HEAD, _HASH_END = b'{"kind":"%s",' % _KIND.encode(), b'"sha256":"', b'",'
_CONTENT = len(_HEAD) + len(_HASH_HEAD) + 64 + len(_HASH_END)  # where what the hash covers goes on
_AGAIN = "build the manifest again, or take an undamaged copy"


@dataclass(frozen=True, slots=True)
class Survey:
    """One source as its files were found: all of them, or one part of `parts`.

    Args:
        format, on_bad_row, block_bytes: the settings of the survey that `source` does not hold.
        listed: how many files the whole source has.
        listing_sha256: the hash of their names and sizes, in order; equal in all parts of one source.
        part, parts: this one holds the files part - 1, part - 1 + parts, … of the list.
    """

    source: Source
    format: str
    on_bad_row: str
    block_bytes: int
    listed: int
    listing_sha256: str
    part: int = 1
    parts: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the entries of a source's files; equal in all its parts."""
        value = {name: getattr(self, name) for name in ("format", "on_bad_row", "block_bytes")}
        return {**value, **{name: item for name, item in source_json(self.source).items() if name not in _NO_SETTINGS}}

    def with_shards(self, shards: Sequence[Shard]) -> Survey:
        """Return the same survey with these files."""
        return replace(self, source=replace(self.source, shards=tuple(shards)))


_NO_SETTINGS = ("shards", "weight")


def listing_sha256(files: Sequence[tuple[str, int]]) -> str:
    """Hash the names and sizes of a source's files, in order."""
    return sha256_bytes(canonical_json([list(file) for file in files]))


def write_manifest_file(path: Path, surveys: Sequence[Survey]) -> str:
    """Write a manifest file; files below its folder are named relative to it, so both can move. Returns its hash.

    Raises:
        DiskError: the file cannot be written.
    """
    folder = Path(os.path.abspath(path)).parent
    digest = hashlib.sha256(_HEAD)
    for piece in _content(surveys, folder):
        digest.update(piece)
    with replacing(path) as file:
        file.write(_HEAD + _HASH_HEAD + digest.hexdigest().encode() + _HASH_END)
        file.writelines(_content(surveys, folder))  # made twice rather than held: it can be larger than memory
        file.write(b"\n")
    return digest.hexdigest()


def _content(surveys: Iterable[Survey], folder: Path) -> Iterator[bytes]:
    """Encode what a manifest file's hash covers after its head: the keys of canonical JSON in their order."""
    yield from encode_sources(
        (_survey_json(survey), (_shard_json(shard, folder) for shard in survey.source.shards)) for survey in surveys
    )
    yield b',"version":%d}' % VERSION


def read_manifest_file(path: Path) -> tuple[Survey, ...]:
    """Read a manifest file, or one part of it, and verify that it is as it was written.

    Raises:
        DataError: E_READ, E_CORRUPT for damage, E_FORMAT for another file or a version this program does not read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        fix = "make it with `openelm data manifest`"
        what = f"cannot read the manifest: {error.strerror or type(error).__name__}"
        raise DataError(what, fix=fix, file=path, code="E_READ") from None
    digest = hashlib.sha256(_HEAD)
    digest.update(memoryview(data)[_CONTENT:-1])
    if not data.startswith(_HEAD + _HASH_HEAD + digest.hexdigest().encode() + _HASH_END) or data[-1:] != b"\n":
        raise _damaged(data, digest.hexdigest(), path)
    folder = Path(os.path.abspath(path)).parent

    def compact(value: dict[str, Any]) -> Any:  # a shard at a time: lists of numbers take ten times the memory
        return _shard_from_json(value, folder) if "blocks" in value else value

    try:
        content = json.loads(data, object_hook=compact)
        if content["version"] != VERSION:
            raise _other_kind(content, path)
        return tuple(map(_survey_from_json, content["sources"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"not a data manifest ({type(error).__name__}: {str(error)[:160]})"
        raise DataError(what, fix=_AGAIN, file=path, code="E_CORRUPT") from None


def _damaged(data: bytes, digest: str, path: Path) -> DataError:
    """Tell a manifest that is not what its hash says from a file of another kind or version."""
    try:
        content = json.loads(data)
        given = content.get("kind"), content.get("version")
    except (ValueError, AttributeError, RecursionError):
        what = "the manifest is damaged: it is not the JSON it was"
        return DataError(what, fix=_AGAIN, file=path, code="E_CORRUPT")
    if given != (_KIND, VERSION):
        return _other_kind(content, path)
    what = f"the manifest is damaged: its SHA-256 is {digest}, but it says {str(content.get('sha256'))[:64]}"
    return DataError(what, fix=_AGAIN, file=path, code="E_CORRUPT")


def _other_kind(content: dict[str, Any], path: Path) -> DataError:
    given = f"kind {content.get('kind')!r}, version {content.get('version')!r}"
    what = f"{given}; this program reads {_KIND!r}, version {VERSION}"
    return DataError(what, fix="make it with `openelm data manifest`", file=path, code="E_FORMAT")


def manifest_of(surveys: Iterable[Survey]) -> Manifest:
    """Return the sources of surveys."""
    return Manifest(tuple(survey.source for survey in surveys))


def load_surveys(path: Path, weights: Mapping[str, float] | None = None) -> tuple[Survey, ...]:
    """Read a manifest that a recipe names.

    Args:
        weights: the sources' shares of the training tokens, by name; 1 for those not named.

    Raises:
        ConfigError: a weight for a source that the manifest does not have, or the file is one part of a manifest.
        DataError: the file is damaged or no manifest; E_EMPTY for a source without text.
    """
    surveys = read_manifest_file(path)
    names = [survey.source.name for survey in surveys]
    if unknown := sorted(set(weights or {}) - set(names)):
        fix = f"allowed: {', '.join(names)}"
        raise ConfigError(f"a weight for {unknown[0]!r}, which the manifest does not have", file=path, fix=fix)
    for survey in surveys:
        if survey.parts != 1:
            fix = "join all parts with `openelm data merge`"
            raise ConfigError(f"this is part {survey.part} of {survey.parts} of a manifest", file=path, fix=fix)
        check_has_text(survey, path)
    shares = {name: (weights or {}).get(name, 1.0) for name in names}
    sources = (replace(survey.source, weight=shares[survey.source.name]) for survey in surveys)
    return tuple(replace(survey, source=source) for survey, source in zip(surveys, sources, strict=True))


def load_manifest(path: Path, weights: Mapping[str, float] | None = None) -> Manifest:
    """Read a manifest that a recipe names, without how it was made; raises what `load_surveys` does."""
    return manifest_of(load_surveys(path, weights))


def survey_sources(
    configs: Sequence[SourceConfig], *, on_bad_row: Literal["error", "skip"] = "error", known: Sequence[Survey] = ()
) -> tuple[Survey, ...]:
    """Find every file of every source, hash and scan those that changed since; raises what `build_manifest` does.

    Args:
        known: what an earlier call found; sources with other settings than then are scanned anew.
    """

    def survey_of(config: SourceConfig, source: Source) -> Survey:
        listing = _listing_of(source.shards)
        return Survey(source, config.format, on_bad_row, BLOCK_BYTES, len(source.shards), listing)

    earlier = {survey.source.name: survey for survey in known}
    usable = {
        config.name: earlier[config.name].source.shards
        for config in configs
        if config.name in earlier and earlier[config.name].settings == survey_of(config, config.source()).settings
    }
    manifest = build_manifest(configs, on_bad_row=on_bad_row, known=usable)
    return tuple(map(survey_of, configs, manifest.sources))


def _listing_of(shards: Iterable[Shard]) -> str:
    return listing_sha256([(shard.name, shard.bytes) for shard in shards])


def check_has_text(survey: Survey, path: Path | str) -> None:
    """Refuse a whole source without a row.

    Raises:
        DataError: E_EMPTY.
    """
    if survey.parts == 1 and not survey.source.rows:
        what = f"source {survey.source.name!r} is empty: {len(survey.source.shards)} files hold no text"
        raise DataError(what, fix="give files with text", file=path, code="E_EMPTY")


def merge_surveys(found: Mapping[Path, Sequence[Survey]]) -> tuple[Survey, ...]:
    """Join parts to whole sources; whole sources of different names come through, in the order given.

    Raises:
        ConfigError: parts overlap, are missing, or differ in number, settings or list of files; names the files.
    """
    groups: dict[str, list[tuple[Path, Survey]]] = {}
    for path, surveys in found.items():
        for survey in surveys:
            groups.setdefault(survey.source.name, []).append((path, survey))
    return tuple(_join(name, group) for name, group in groups.items())


def _join(name: str, group: Sequence[tuple[Path, Survey]]) -> Survey:
    first_path, first = group[0]
    seen: dict[int, Path] = {}
    for path, survey in group:
        _check_fits(name, first_path, first, path, survey)
        if survey.part in seen:
            what = f"{seen[survey.part]} and {path} overlap: both are part {survey.part} of {survey.parts} of {name!r}"
            raise ConfigError(what, fix="give each part once")
        seen[survey.part] = path
    if missing := [f"{part}/{first.parts}" for part in range(1, first.parts + 1) if part not in seen]:
        given = ", ".join(str(seen[part]) for part in sorted(seen))
        raise ConfigError(
            f"{name!r} has a gap: part {', '.join(missing)} is missing (given: {given})", fix="give all parts"
        )
    shards: list[Shard | None] = [None] * first.listed
    for path, survey in group:
        if len(shards[survey.part - 1 :: survey.parts]) != len(survey.source.shards):
            raise DataError("the part does not hold the files it should", fix=_AGAIN, file=path, code="E_CORRUPT")
        shards[survey.part - 1 :: survey.parts] = survey.source.shards
    whole = tuple(filter(None, shards))
    if _listing_of(whole) != first.listing_sha256:
        what = "the files of the parts are not those of the list"
        raise DataError(what, fix=_AGAIN, file=first_path, code="E_CORRUPT")
    joined = replace(first.with_shards(whole), part=1, parts=1)
    check_has_text(joined, first_path)
    return joined


def _check_fits(name: str, first_path: Path, first: Survey, path: Path, survey: Survey) -> None:
    if survey.parts != first.parts:
        what = f"{first_path} is one of {first.parts} parts of {name!r}, but {path} is one of {survey.parts}"
        raise ConfigError(what, fix="merge the parts of one number only")
    for key, value in survey.settings.items():
        if value != first.settings[key]:
            differ = f"{first.settings[key]!r} in {first_path}, {value!r} in {path}"
            raise ConfigError(f"the parts of {name!r} differ in {key}: {differ}", fix="make all with the same settings")
    if survey.listing_sha256 != first.listing_sha256:
        lists = f"{first_path} ({first.listed} files) and {path} ({survey.listed} files)"
        fix = "make all parts from the same files; none may be added or changed in between"
        raise ConfigError(f"{lists} are of different lists of files", fix=fix)


def _survey_json(survey: Survey) -> dict[str, Any]:
    return {**{name: getattr(survey, name) for name in Survey.__slots__}, "source": source_json(survey.source)}


def _survey_from_json(value: dict[str, Any]) -> Survey:
    check_kinds(value, _KINDS)
    shards = value["source"].get("shards")
    if not all(isinstance(shard, Shard) for shard in shards):
        raise ValueError("an entry without blocks")
    return Survey(**{**value, "source": source_from_json(value["source"], shards)})


_KINDS = {
    "source": (dict,),
    **dict.fromkeys(("format", "on_bad_row", "listing_sha256"), (str,)),
    **dict.fromkeys(("block_bytes", "listed", "part", "parts"), (int,)),
}


def _shard_json(shard: Shard, folder: Path) -> dict[str, Any]:
    value = shard_json(shard)
    if not is_url(shard.path) and Path(shard.path).is_relative_to(folder):
        value["path"] = Path(shard.path).relative_to(folder).as_posix()
    return value


def _shard_from_json(value: dict[str, Any], folder: Path) -> Shard:
    shard = shard_from_json(value)
    return shard if is_url(shard.path) else replace(shard, path=str(folder / shard.path))
