"""The ledger: one JSON object a line, each holding the SHA-256 of the line before it. History is never rewritten."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from openelm.errors import CheckpointError, DiskError
from openelm.files.atomic import disk_errors, write_atomic
from openelm.files.hashes import sha256_bytes

FIRST = "0" * 64
_TAIL_BYTES = 1 << 16


MEASUREMENTS = frozenset({"evaluation", "examples", "suite", "sample"})
"""Kinds of events that say what a model does at a step."""


def number(value: str | float) -> float:
    """Read a number of the ledger: hex text (exact to the bit) or a plain one."""
    return float.fromhex(value) if isinstance(value, str) else float(value)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Read all whole lines and check the chain.

    Raises:
        CheckpointError: a line was changed, removed or is not JSON; names it.
    """
    return [event for event, _ in read_lines(path)]


def read_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each whole line with its SHA-256, checking the chain on the way; nothing where there is no ledger.

    Raises:
        CheckpointError: a line was changed, removed or is not JSON; names it.
    """
    head = FIRST
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn by an interrupted write
            try:
                event = json.loads(line)
                previous, _ = event["prev"], event["event"]
            except (ValueError, KeyError, TypeError, RecursionError):
                what = "this line of the ledger is not one it wrote"
                raise CheckpointError(what, file=path, line=number) from None
            if previous != head:
                what = "the chain breaks here: this line or the one before it was changed"
                raise CheckpointError(what, file=path, line=number)
            head = sha256_bytes(line[:-1])
            yield event, head


def ledger_head(path: Path) -> str:
    """Return the SHA-256 of the last whole line, which no later line holds.

    Raises:
        CheckpointError: the chain is broken.
    """
    head = FIRST
    for _, digest in read_lines(path):
        head = digest
    return head


def valid_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what a later `rewind` declared void: events of steps after the one it went back to.

    A run that goes back to its beginning measures it again.
    """
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "rewind":
            void = () if event["to"] else MEASUREMENTS
            kept = [old for old in kept if old.get("step", 0) <= event["to"] and old["event"] not in void]
        kept.append(event)
    return kept


class Ledger:
    """Append events; opening checks the chain and puts a torn last line aside as `ledger.torn`.

    Attributes:
        head: SHA-256 of the last line.
        last_event: the kind of the last line when it was opened; None: there was none.
        furthest_step: the greatest step of a line then.

    Raises:
        CheckpointError: the chain is broken.
        DiskError: the disk is full or read-only.
    """

    def __init__(self, path: Path) -> None:
        self.head, self.last_event, self.furthest_step = FIRST, None, 0
        for event, self.head in read_lines(path):
            self.last_event = event["event"]
            self.furthest_step = max(self.furthest_step, event.get("step", 0))
        self._path = path
        if torn := _torn_line(path):
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


def _torn_line(path: Path) -> bytes:
    """Return what stands behind the last line end."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return b""
    with file:
        start = end = file.seek(0, os.SEEK_END)
        tail = b""
        while start and b"\n" not in tail:
            start = max(0, start - _TAIL_BYTES)
            file.seek(start)
            tail = file.read(end - start)
    return tail[tail.rfind(b"\n") + 1 :]
