"""A file that is hashed, and sent to the disk, while it is written."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from openelm.files.hashes import FileFacts

_PIECE_BYTES, _PIECES_AHEAD = 4 << 20, 16
_WRITE_BYTES = 256 << 10  # the kernel looks for no large stretches of free memory for these: that can cost ten times
_SYNC_BYTES = 64 << 20


class HashedFile:
    """A file to write from its beginning to its end, once; it need not be read again for a manifest.

    The digest, the checksums, the kernel's copy and the disk have a thread each, so that whoever makes the next bytes
    waits for the slowest of them, not for the sum.

    Args:
        size: how many bytes will be written.

    Attributes:
        facts: the file's entry in a manifest, after the `with` block.
        end: how many bytes were given so far.

    Raises:
        OSError: the disk is full or read-only; on entering, on a later write or at the end.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.facts, self.end, self._path = FileFacts(size), 0, path
        self._stack = ExitStack()
        self._pending: deque[Future[None]] = deque()
        self._syncing: Future[None] | None = None
        self._unsynced = 0

    def __enter__(self) -> HashedFile:
        self._file = self._stack.enter_context(self._path.open("wb", buffering=0))
        threads = [self._stack.enter_context(ThreadPoolExecutor(1)) for _ in range(4)]
        self._digester, self._checker, self._writer, self._syncer = threads
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Give the next bytes, which must stay as they are until the file is closed."""
        whole = memoryview(data)
        for start in range(0, len(whole), _PIECE_BYTES):
            piece = whole[start : start + _PIECE_BYTES]
            self._pending.append(self._digester.submit(self.facts.digest, piece))
            self._pending.append(self._checker.submit(self.facts.check, piece))
            self._pending.append(self._writer.submit(self._write, piece))
            self.end += len(piece)
            while len(self._pending) > 3 * _PIECES_AHEAD:
                self._pending.popleft().result()

    def _write(self, data: memoryview) -> None:
        self._unsynced += len(data)
        while data:
            data = data[self._file.write(data[:_WRITE_BYTES]) :]
        if self._unsynced >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._synced()
            self._syncing, self._unsynced = self._syncer.submit(os.fsync, self._file.fileno()), 0

    def _synced(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        with self._stack:
            if kind is None:
                for step in self._pending:
                    step.result()
                self._synced()
                os.fsync(self._file.fileno())
