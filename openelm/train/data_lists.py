"""The lists of a run's data files, such as `data.json`, in its folder; `run.json` holds their summaries."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from openelm.data.manifest import Manifest
from openelm.data.manifest_file import Survey, manifest_of, read_manifest_file
from openelm.errors import CheckpointError, DataError

LISTS = {"data": "data.json", "held_out": "held-out.json", "held_out_examples": "held-out-examples.json"}
"""File names by the keys of their summaries in `run.json`."""

Lists = Mapping[str, tuple[Survey, ...]]


def read_lists(folder: Path, description: Mapping[str, Any], allow_change: Collection[str]) -> Lists:
    """Read the lists of an earlier start.

    Args:
        description: the content of `run.json`.
        allow_change: with `data_sha256` in it nothing is known of the data, whatever the list says.

    Raises:
        CheckpointError: a list is missing, damaged, or not the one that `run.json` speaks of.
    """
    return {
        key: _read_list(folder / name, description[key]["sha256"], f"{key}_sha256")
        for key, name in LISTS.items()
        if description.get(key) is not None and f"{key}_sha256" not in allow_change
    }


def _read_list(path: Path, sha256: str, change: str) -> tuple[Survey, ...]:
    fix = f"restore it from a copy, or have all files scanned again with --allow-change {change}"
    try:
        surveys = read_manifest_file(path)
    except DataError as error:
        raise CheckpointError(error.what, file=path, fix=fix) from None
    if (found := manifest_of(surveys).sha256) != sha256:
        what = f"this is not the run's list of files: it stands for data {found}, but run.json says {sha256}"
        raise CheckpointError(what, file=path, fix=fix)
    return surveys


def first_difference(old: Manifest, new: Manifest) -> str:
    """Name the first file that differs between two manifests, or say that the settings do."""
    sources = {source.name: source for source in new.sources}
    for source in old.sources:
        if source.name not in sources:
            return f"source {source.name!r} is not there any more"
        shards = {shard.name: shard for shard in sources.pop(source.name).shards}
        for shard in source.shards:
            if shard.name not in shards:
                return f"{shard.name} of source {source.name!r} is not there any more"
            if (found := shards.pop(shard.name)).sha256 != shard.sha256:
                return f"{found.path} has SHA-256 {found.sha256}, and had {shard.sha256}"
        if shards:
            return f"{next(iter(shards))} of source {source.name!r} was not there before"
    return f"source {next(iter(sources))!r} is new" if sources else "the order, cutting or settings of the files differ"
