"""Manifest files: what one or many machines found of a source, with the file's own hash; parts and their merging."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openelm.data.manifest import Manifest, Shard, Source, source_from_json, source_json
from openelm.data.remote import is_url
from openelm.errors import ConfigError, DataError
from openelm.files import canonical_json, sha256_bytes, write_atomic

VERSION = 1
_KIND = "openelm data manifest"
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
        """What must be equal in all parts of one source."""
        value = {name: getattr(self, name) for name in ("format", "on_bad_row", "block_bytes")}
        source = source_json(replace(self.source, shards=()))
        return {**value, **{name: source[name] for name in source if name != "shards"}}

    def with_shards(self, shards: Sequence[Shard]) -> Survey:
        """Return the same survey with these files."""
        return replace(self, source=replace(self.source, shards=tuple(shards)))


def listing_sha256(files: Sequence[tuple[str, int]]) -> str:
    """Hash the names and sizes of a source's files, in order."""
    return sha256_bytes(canonical_json([list(file) for file in files]))


def write_manifest_file(path: Path, surveys: Sequence[Survey]) -> str:
    """Write a manifest file; files below its folder are named relative to it, so both can move. Returns its hash.

    Raises:
        DiskError: the file cannot be written.
    """
    folder = Path(os.path.abspath(path)).parent
    content: dict[str, Any] = {"kind": _KIND, "version": VERSION}
    content["sources"] = [_survey_json(survey, folder) for survey in surveys]
    content["sha256"] = sha256_bytes(canonical_json(content))
    write_atomic(path, canonical_json(content) + b"\n")
    return str(content["sha256"])


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
    try:
        content = json.loads(data)
        kind, version = content.get("kind"), content.get("version")
    except (ValueError, AttributeError, RecursionError):
        raise DataError(
            "the manifest is damaged: it is not the JSON it was", fix=_AGAIN, file=path, code="E_CORRUPT"
        ) from None
    if kind != _KIND or version != VERSION:
        what = f"kind {kind!r}, version {version!r}; this program reads {_KIND!r}, version {VERSION}"
        raise DataError(what, fix="make it with `openelm data manifest`", file=path, code="E_FORMAT")
    expected = content.pop("sha256", None)
    found = sha256_bytes(canonical_json(content))
    if found != expected or canonical_json({**content, "sha256": expected}) + b"\n" != data:
        what = f"the manifest is damaged: its SHA-256 is {found}, but it says {str(expected)[:64]}"
        raise DataError(what, fix=_AGAIN, file=path, code="E_CORRUPT")
    try:
        folder = Path(os.path.abspath(path)).parent
        return tuple(_survey_from_json(value, folder) for value in content["sources"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"not a data manifest ({type(error).__name__}: {error})"
        raise DataError(what, fix=_AGAIN, file=path, code="E_CORRUPT") from None


def load_manifest(path: Path, weights: Mapping[str, float] | None = None) -> Manifest:
    """Read the manifest of a run.

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
    sources = (survey.source for survey in surveys)
    return Manifest(tuple(replace(source, weight=(weights or {}).get(source.name, 1.0)) for source in sources))


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
    if listing_sha256([(shard.name, shard.bytes) for shard in whole]) != first.listing_sha256:
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


def _survey_json(survey: Survey, folder: Path) -> dict[str, Any]:
    value = source_json(survey.source)
    for shard in value["shards"]:
        if not is_url(shard["path"]) and Path(shard["path"]).is_relative_to(folder):
            shard["path"] = Path(shard["path"]).relative_to(folder).as_posix()
    names = (name for name in Survey.__slots__ if name != "source")
    return {"source": value, **{name: getattr(survey, name) for name in names}}


def _survey_from_json(value: dict[str, Any], folder: Path) -> Survey:
    source = source_from_json(value["source"])
    shards = tuple(
        shard if is_url(shard.path) else replace(shard, path=str(folder / shard.path)) for shard in source.shards
    )
    return Survey(**{**value, "source": source}).with_shards(shards)
