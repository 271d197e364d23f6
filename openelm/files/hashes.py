"""Reading and hashing files, and what a manifest says of one; plain data as the same bytes everywhere."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from isal import isal_zlib  # zlib's checksum at three times its speed, which conversions wait for

READ_BYTES = 1 << 20
_LEAST_PIECE_BYTES, _MOST_PIECES = 1 << 12, 1 << 10


def sha256_bytes(data: bytes) -> str:
    """Hash bytes; returns 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, read: Callable[[int], None] = lambda count: None) -> str:
    """Hash a file's content; returns 64 hex digits.

    Args:
        read: called with the number of bytes of each piece that was read.
    """
    with path.open("rb") as file:
        return sha256_stream(file, read)


def sha256_stream(file: BinaryIO, read: Callable[[int], None] = lambda count: None) -> str:
    """Hash what is left of an open file; returns 64 hex digits. `read` is called as by `sha256_file`."""
    digest = hashlib.sha256()
    while data := file.read(READ_BYTES):
        digest.update(data)
        read(len(data))
    return digest.hexdigest()


def read_file(path: Path) -> bytes:
    """Read a file whole.

    Raises:
        OSError: it cannot be read, or is a pipe or device, which could go on for ever.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "not a file", path)
    return path.read_bytes()


def canonical_json(value: Any) -> bytes:
    """Encode plain data the same way everywhere: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def crc32(data: bytes) -> str:
    """Return the checksum of bytes as eight hex digits."""
    return f"{isal_zlib.crc32(data):08x}"


def piece_bytes(size: int) -> int:
    """Say how long the pieces of a file are: a power of two, 4 KiB or more, so that there are at most 1,024."""
    return max(_LEAST_PIECE_BYTES, 1 << (-(-size // _MOST_PIECES) - 1).bit_length())


class FileFacts:
    """What a manifest says of a file: SHA-256 decides whether it is damaged, the pieces' checksums only say where.

    Args:
        size: of the whole file, which decides how long the pieces are.
    """

    def __init__(self, size: int) -> None:
        self.size, self._seen = size, 0
        self._digest, self._pieces, self._piece = hashlib.sha256(), list[str](), 0

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the file, as many as you like."""
        self.digest(data)
        self.check(data)

    def digest(self, data: bytes | memoryview) -> None:
        """Do the first half of `update`, which another thread may do while one does the second."""
        self._digest.update(data)

    def check(self, data: bytes | memoryview) -> None:
        """Do the second half of `update`."""
        data, length = memoryview(data), piece_bytes(self.size)
        while data:
            part = data[: length - self._seen % length]
            self._piece = isal_zlib.crc32(part, self._piece)
            self._seen += len(part)
            if self._seen % length == 0 or self._seen == self.size:
                self._pieces.append(f"{self._piece:08x}")
                self._piece = 0
            data = data[len(part) :]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        assert self._seen == self.size
        return {"bytes": self.size, "sha256": self._digest.hexdigest(), "crc32": "".join(self._pieces)}


def facts_of_file(path: Path) -> FileFacts:
    """Read a file for its entry in a manifest."""
    facts = FileFacts(path.stat().st_size)
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            facts.update(data)
    return facts
