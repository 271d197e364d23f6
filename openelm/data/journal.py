"""A line-by-line journal of finished shards, so that work that was killed goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from openelm.data.manifest import Shard, State, shard_from_json, shard_json
from openelm.errors import ConfigError
from openelm.files.atomic import disk_errors
from openelm.files.hashes import canonical_json
from openelm.files.locks import lock_file


class Journal:
    """The shards that earlier starts of the same command finished; use it as a context manager.

    Args:
        path: the file; it is made when it is not there, and held until the end.
        settings: what decides the content of a shard's entry.

    Raises:
        ConfigError: another process holds it, or it was written with other settings.
        DiskError: it cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._shards: dict[tuple[str, State], Shard] = {}
        with disk_errors(path):
            self._file = path.open("a+b")
        try:
            if not lock_file(self._file):
                fix = "wait for it, stop it, or choose another --out"
                raise ConfigError("another process is at work on this", file=path, fix=fix)
            self._read(canonical_json({"settings": settings}))
        except BaseException:
            self._file.close()
            raise

    def find(self, path: str, state: State) -> Shard | None:
        """Return the finished entry of a file, if the file is still the one it was."""
        return self._shards.get((path, state))

    def add(self, shard: Shard) -> None:
        """Write down a finished shard.

        Raises:
            DiskError: it cannot be written.
        """
        self._write(canonical_json(shard_json(shard)))

    def remove(self) -> None:
        """Delete the file: the work is published."""
        self._path.unlink(missing_ok=True)

    def _read(self, header: bytes) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            if number == 0 and line != header + b"\n":
                fix = "give the same settings again, remove the journal, or choose another --out"
                raise ConfigError("this journal is of a command with other settings", file=self._path, fix=fix)
            if number:
                try:
                    shard = shard_from_json(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    break
                self._shards[shard.path, shard.state] = shard
            end += len(line)
        with disk_errors(self._path):
            self._file.truncate(end)  # a line that a kill cut short is done again
        if not end:
            self._write(header)

    def _write(self, line: bytes) -> None:
        with disk_errors(self._path):
            self._file.write(line + b"\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
