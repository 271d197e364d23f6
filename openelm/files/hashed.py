"""A file that is hashed, and sent to the disk, while it is written."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType

from openelm.files.direct import DirectFile
from openelm.files.hashes import FileFacts

_PIECE_BYTES, _PIECES_AHEAD = 4 << 20, 16


class HashedFile:
    """A file to write from its beginning to its end, once; it need not be read again for a manifest.

    The digest, the checksums and the disk have a thread each, so that whoever makes the next bytes waits for the
    slowest of them, not for the sum.

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

    def __enter__(self) -> HashedFile:
        self._file = self._stack.enter_context(closing(DirectFile(self._path)))
        threads = [self._stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3)]
        self._digester, self._checker, self._writer = threads
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Give the next bytes, which must stay as they are until the file is closed."""
        whole = memoryview(data)
        for start in range(0, len(whole), _PIECE_BYTES):
            piece = whole[start : start + _PIECE_BYTES]
            self._pending.append(self._digester.submit(self.facts.digest, piece))
            self._pending.append(self._checker.submit(self.facts.check, piece))
            self._pending.append(self._writer.submit(self._file.write, piece))
            self.end += len(piece)
            while len(self._pending) > 3 * _PIECES_AHEAD:
                self._pending.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        with self._stack:
            if kind is None:
                for step in self._pending:
                    step.result()
                self._file.finish()
