"""Lists of documents not to train on: written by the cleaning verbs, read by a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openelm.data.document import Document, no_such_file
from openelm.data.manifest import Manifest, Shard, Source, unreadable
from openelm.errors import DataError
from openelm.files.hashes import canonical_json, sha256_bytes, sha256_file

CONTAMINATED, DUPLICATE = "contaminated", "duplicate"
REASONS = (CONTAMINATED, DUPLICATE)
_FIX = "write the list again with `openelm data decontaminate` or `openelm data dedup`"


@dataclass(frozen=True)
class Exclusions:
    """The documents of a run's data that lists name.

    Args:
        sha256: hash of the lists, in order.
        shards: path of a shard -> its excluded rows, ascending, and for each the index of its reason.
    """

    sha256: str
    shards: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]

    def reason(self, document: Document) -> str | None:
        """Name why a document is excluded, or None."""
        if document.path not in self.shards:
            return None
        rows, reasons = self.shards[document.path]
        place = int(np.searchsorted(rows, document.row))
        if place == len(rows) or rows[place] != document.row:
            return None
        return REASONS[reasons[place]]


def exclusion_line(source: Source, shard: Shard, row: int, reason: str, **more: Any) -> bytes:
    """Encode one line of a list; `more` is for people."""
    line = {"source": source.name, "shard": shard.name, "row": row, "reason": reason, **more}
    return canonical_json({**line, "shard_sha256": shard.sha256}) + b"\n"


def load_exclusions(paths: Sequence[str], manifest: Manifest) -> Exclusions:
    """Find the documents that lists name in a run's data, by the content of their files.

    A file is known by its SHA-256, and by its name where several files have the same content. Lines about
    files that the run does not read are passed over.

    Raises:
        DataError: a list is missing or damaged (E_PATH, E_READ, E_JSON, E_SCHEMA); a listed file has other content
            now, or no line is about this run's data (E_CHANGED).
    """
    places = _Places(manifest)
    found: dict[str, dict[int, int]] = {}
    listed = 0
    for path in map(Path, paths):
        for number, line in _lines(path):
            listed += 1
            for shard in places.of(line, path, number):
                found.setdefault(shard.path, {}).setdefault(line["row"], REASONS.index(line["reason"]))
    if listed and not found:
        what = f"none of the {listed:,} listed documents is in this run's data"
        raise DataError(what, fix="give the lists of these files, or leave them out", file=paths[0], code="E_CHANGED")
    digests = [sha256_file(Path(path)) for path in paths]
    shards = {path: _arrays(rows) for path, rows in found.items()}
    return Exclusions(sha256_bytes("".join(digests).encode()), shards)


def _arrays(rows: dict[int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    ordered = sorted(rows)
    return np.array(ordered, np.int64), np.array([rows[row] for row in ordered], np.uint8)


class _Places:
    """Which shards of a manifest a line is about."""

    def __init__(self, manifest: Manifest) -> None:
        self._by_content: dict[str, list[Shard]] = {}
        self._names = {(source.name, shard.name) for source in manifest.sources for shard in source.shards}
        for source in manifest.sources:
            for shard in source.shards:
                self._by_content.setdefault(shard.sha256, []).append(shard)

    def of(self, line: dict[str, Any], path: Path, number: int) -> list[Shard]:
        shards = self._by_content.get(line["shard_sha256"], [])
        if not shards and (line["source"], line["shard"]) in self._names:
            what = f"{line['shard']!r} of source {line['source']!r} has other content than when the list was made"
            raise DataError(what, fix=_FIX, file=path, line=number, code="E_CHANGED")
        if len(shards) > 1:
            shards = [shard for shard in shards if shard.name == line["shard"]]
        if any(line["row"] >= shard.rows for shard in shards):
            what = f"row {line['row']} of {line['shard']!r} does not exist: it was cut into documents differently"
            raise DataError(what, fix=_FIX, file=path, line=number, code="E_CHANGED")
        return shards


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                yield number, _line(data, path, number)
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _line(data: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        line = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError("not valid JSON", fix=_FIX, file=path, line=number, code="E_JSON") from None
    texts = ("source", "shard", "shard_sha256", "reason")
    if (
        not isinstance(line, dict)
        or not all(isinstance(line.get(key), str) for key in texts)
        or type(line.get("row")) is not int
        or line["row"] < 0
        or line["reason"] not in REASONS
    ):
        what = f"a line needs source, shard, shard_sha256, row and a reason ({' or '.join(REASONS)})"
        raise DataError(what, fix=_FIX, file=path, line=number, code="E_SCHEMA")
    return line
