"""The only place that renames files. A reader sees the old or the new, whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from openelm.errors import DiskError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a DiskError that names the path and what is free.

    Raises:
        DiskError: the write inside the block failed for a reason the user can mend.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FIXES:
            raise
        raise DiskError(
            f"cannot write: {os.strerror(error.errno)}{_free_space(path)}",
            file=path,
            fix=_DISK_FIXES[error.errno],
        ) from None


_DISK_FIXES = {
    errno.ENOSPC: "free some space and run the same command again; what was already saved is intact",
    errno.EDQUOT: "your quota is used up: free some space and run the same command again",
    errno.EFBIG: "a file size limit was reached (ulimit -f); what was already saved is intact",
    errno.EIO: "the disk reports an error; what was already saved is intact",
    errno.EROFS: "the file system is read-only: choose another folder with --out",
    errno.EACCES: "you may not write there: choose another folder with --out or change its permissions",
    errno.EPERM: "you may not write there: choose another folder with --out or change its permissions",
    errno.ENOTDIR: "a part of this path is a file: choose another folder with --out",
    errno.ENOENT: "a part of this path is missing: choose another folder with --out",
    errno.ENAMETOOLONG: "the name is too long: choose another folder with --out",
    errno.EEXIST: "a file of this name is in the way: choose another folder with --out",
}


def _free_space(path: Path) -> str:
    existing = next((parent for parent in (path, *path.parents) if os.path.exists(parent)), None)
    if existing is None:
        return ""
    return f" ({shutil.disk_usage(existing).free:,} bytes free)"


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises:
        DiskError: it cannot be created.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content; after a crash the file holds all of the old or all of the new bytes.

    Raises:
        DiskError: the disk is full, read-only or forbidden; the old file is intact.
    """
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write to that becomes `path` atomically when the block ends well.

    Raises:
        DiskError: the disk is full, read-only or forbidden; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` atomically when the block ends well; an older one is removed then.

    Raises:
        DiskError: the disk is full, read-only or forbidden; nothing is left under the final name.
    """
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    with disk_errors(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                sync_file(file)
            _sync_folder(temporary)
            _swap(temporary, target)
            _sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name."""
    hidden = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    with disk_errors(folder):
        os.rename(folder, hidden)
        shutil.rmtree(hidden)


def set_aside(folder: Path) -> Path:
    """Rename a damaged folder so that it is kept for a look but never read as a good one; returns its new path."""
    aside = folder.with_name(f"damaged-{folder.name}")
    with disk_errors(folder):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        _sync_folder(folder.parent)
    return aside


def remove_leftovers(folder: Path) -> None:
    """Remove temporary folders and files that a killed process left behind; call only while holding the lock."""
    for path in folder.glob(".*.tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.glob(".*.old-*"):  # killed between the two renames: the old folder is the good one
        target = folder / path.name[1:].rpartition(".old-")[0]
        os.rename(path, target) if not target.exists() else shutil.rmtree(path)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
