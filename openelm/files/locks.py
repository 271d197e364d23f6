"""Locks that go with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from openelm.errors import CheckpointError
from openelm.files.atomic import disk_errors


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another process holds it.
    """
    path = folder / ".lock"
    with disk_errors(path):
        file = path.open("a+")
    with file:
        if not lock_file(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise CheckpointError(
                f"{owner} is using this folder",
                file=folder,
                fix="wait for it, stop it, or choose another --out",
            )
        with disk_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
        yield


def lock_file(file: IO[Any]) -> bool:
    """Lock an open file for this process until it is closed; False when another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
