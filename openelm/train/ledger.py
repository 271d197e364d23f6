"""The ledger: one JSON object a line, each holding the SHA-256 of the line before it. History is never rewritten."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from openelm.errors import CheckpointError, DiskError
from openelm.files import disk_errors, sha256_bytes, write_atomic

FIRST = "0" * 64


def number(value: str | float) -> float:
    """Read a number of the ledger: hex text (exact to the bit) or a plain one."""
    return float.fromhex(value) if isinstance(value, str) else float(value)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Read all whole lines and check the chain.

    Raises:
        CheckpointError: a line was changed, removed or is not JSON; names it.
    """
    return [event for event, _ in read_lines(path)]


def read_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Read all whole lines, each with its SHA-256, and check the chain.

    Raises:
        CheckpointError: a line was changed, removed or is not JSON; names it.
    """
    return _read(path)[0]


def ledger_head(path: Path) -> str:
    """Return the SHA-256 of the last whole line, which no later line holds.

    Raises:
        CheckpointError: the chain is broken.
    """
    lines = read_lines(path)
    return lines[-1][1] if lines else FIRST


def valid_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what a later `rewind` declared void: events of steps after the one it went back to."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "rewind":
            kept = [old for old in kept if old.get("step", 0) <= event["to"]]
        kept.append(event)
    return kept


def _read(path: Path) -> tuple[list[tuple[dict[str, Any], str]], bytes]:
    """Return (event, hash of its line) for each whole line, and the torn rest of an interrupted write."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], b""
    lines, head, result = data.split(b"\n"), FIRST, []
    for index, line in enumerate(lines[:-1], start=1):
        try:
            event = json.loads(line)
            previous, _ = event["prev"], event["event"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CheckpointError("this line of the ledger is not one it wrote", file=path, line=index) from None
        if previous != head:
            raise CheckpointError(
                "the chain breaks here: this line or the one before it was changed", file=path, line=index
            )
        head = sha256_bytes(line)
        result.append((event, head))
    return result, lines[-1]


class Ledger:
    """Append events; opening checks the chain and puts a torn last line aside as `ledger.torn`.

    Raises:
        CheckpointError: the chain is broken.
        DiskError: the disk is full or read-only.
    """

    def __init__(self, path: Path) -> None:
        events, torn = _read(path)
        self.events = [event for event, _ in events]
        self.head = events[-1][1] if events else FIRST
        self._path = path
        if torn:
            write_atomic(path.with_suffix(".torn"), torn)
        with disk_errors(path):
            self._file = path.open("ab")
            if torn:
                self._file.truncate(path.stat().st_size - len(torn))

    def append(self, event: Mapping[str, Any]) -> None:
        """Write one event; the line is in the kernel's hands when this returns, on disk after `sync`."""
        line = json.dumps({**event, "prev": self.head}, allow_nan=False, ensure_ascii=True).encode()
        with disk_errors(self._path):
            self._file.write(line + b"\n")
            self._file.flush()
        self.head = sha256_bytes(line)

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what a full disk refused before is refused again.

        Raises:
            DiskError: the last line could not be written.
        """
        with disk_errors(self._path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(*(() if error is None else (DiskError,))):  # the first error says more
            self.close()
