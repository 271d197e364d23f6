"""A file that goes to the disk past the kernel's cache, where the system can do that."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

_PIECE_BYTES = 4 << 20
_CACHED_BYTES = 256 << 10  # the kernel looks for no large stretches of free memory for these: that can cost ten times
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it; elsewhere the file is an ordinary one


class DirectFile:
    """A file to write from its beginning to its end, once, of which the kernel keeps no copy in memory.

    Making that copy can take longer than the disk: in a virtual machine whose memory is new, 0.5 GB/s were seen. So
    bytes are collected in aligned memory and the disk takes them from there, a piece at a time. A file system that
    cannot do that (EINVAL, by open(2)) gets the file in the ordinary way.

    Raises:
        OSError: the disk is full or read-only; on making it, or on a later `write` or `finish`.
    """

    def __init__(self, path: Path) -> None:
        self._piece = memoryview(mmap.mmap(-1, _PIECE_BYTES))  # begins with a page, as O_DIRECT asks for
        self._held = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._file, self._direct = os.open(path, flags | _DIRECT, 0o666), bool(_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file, self._direct = os.open(path, flags, 0o666), False

    def write(self, data: memoryview) -> None:
        """Take the next bytes; they are copied, or on the disk, when this returns."""
        while data:
            part = data[: _PIECE_BYTES - self._held]
            self._piece[self._held : self._held + len(part)] = part
            self._held, data = self._held + len(part), data[len(part) :]
            if self._held == _PIECE_BYTES:
                self._send()

    def finish(self) -> None:
        """Write what is left, and wait until the disk has everything."""
        self._use_cache()  # for the last bytes are no whole block of the disk
        self._send()
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _send(self) -> None:
        rest, self._held = self._piece[: self._held], 0
        while rest:
            try:
                count = os.write(self._file, rest if self._direct else rest[:_CACHED_BYTES])
            except OSError as error:
                if not (self._direct and error.errno == errno.EINVAL):
                    raise
                count = 0
            rest = rest[count:]
            if self._direct and rest:  # refused, or cut where no block of the disk ends
                self._use_cache()

    def _use_cache(self) -> None:
        if self._direct:
            fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT)
            self._direct = False
