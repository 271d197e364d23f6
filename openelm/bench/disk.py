"""What the disk of a folder can do: one large file, written in sequence and read again."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from pathlib import Path

from openelm.bench.measurement import Measurement, Progress
from openelm.errors import ConfigError
from openelm.files.atomic import disk_errors

_CHUNK_BYTES = 1 << 22
_PROBES = 64


def measure_disk(folder: Path, size_bytes: int, repeats: int, progress: Progress) -> list[Measurement]:
    """Write a temporary file until the disk has it (fsync), drop it from the page cache, and read it.

    Raises:
        ConfigError: there is no such folder.
        DiskError: it cannot be written, or is full.
    """
    if not folder.is_dir():
        raise ConfigError(f"--folder {folder} is no folder", fix="give a folder on the disk to measure")
    size_bytes = max(1, size_bytes // _CHUNK_BYTES) * _CHUNK_BYTES
    written, read, caches = [], [], set()
    for turn in range(repeats):
        with disk_errors(folder), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            written.append(size_bytes / 1e9 / _write(file.fileno(), size_bytes))
            caches.add(_drop_cache(file.fileno(), size_bytes))
            read.append(size_bytes / 1e9 / _read(file.fileno()))
        progress("disk", turn + 1, repeats)
    cache = next((state for state in ("not dropped", "unknown") if state in caches), "dropped")
    settings = {"file_bytes": size_bytes, "folder": str(folder)}
    return [
        Measurement("disk-write", tuple(written), "GB/s", settings=settings),
        Measurement("disk-read", tuple(read), "GB/s", settings={**settings, "cache": cache}),
    ]


def _write(file: int, size_bytes: int) -> float:
    """Write random bytes, which no file system makes smaller; returns seconds."""
    data = os.urandom(_CHUNK_BYTES)
    began = time.perf_counter()
    for start in range(0, size_bytes, _CHUNK_BYTES):
        left = memoryview(data)
        while left:
            left = left[os.pwrite(file, left, start + _CHUNK_BYTES - len(left)) :]
    os.fsync(file)
    return time.perf_counter() - began


def _read(file: int) -> float:
    buffer = bytearray(_CHUNK_BYTES)
    began = time.perf_counter()
    os.lseek(file, 0, os.SEEK_SET)
    while os.readv(file, [buffer]):
        pass
    return time.perf_counter() - began


def _drop_cache(file: int, size_bytes: int) -> str:
    """Ask the system to forget a file's pages; says whether it did: "dropped", "not dropped" or "unknown"."""
    if not hasattr(os, "posix_fadvise"):
        return "not dropped"
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    if not hasattr(os, "RWF_NOWAIT"):
        return "unknown"
    byte = bytearray(1)
    for probe in range(_PROBES):  # from the end: what is read brings the pages behind it into the cache
        try:
            os.preadv(file, [byte], (size_bytes - 1) * (_PROBES - probe) // _PROBES, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return "unknown"
        return "not dropped"
    return "dropped"
