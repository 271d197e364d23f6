"""A file written past the kernel's cache, and on file systems that cannot do that."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from openelm.files import direct
from openelm.files.direct import DirectFile

PIECE = 4 << 20
DATA = os.urandom(2 * PIECE + 12_345)
needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")


def write(path: Path, data: bytes = DATA, pieces: int = 7) -> None:
    length = len(data) // pieces + 1
    with contextlib.closing(DirectFile(path)) as file:
        for start in range(0, len(data), length):
            file.write(memoryview(data)[start : start + length])
        file.finish()


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """The sizes of the writes that the kernel is asked for, and whether they go past its cache."""
    seen: list[tuple[bool, int]] = []
    real = os.write

    def note(descriptor: int, data: memoryview) -> int:
        seen.append((is_direct(descriptor), len(data)))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", note)
    return seen


@needs_direct
def test_whole_pieces_go_past_the_cache_and_the_last_bytes_do_not(
    tmp_path: Path, writes: list[tuple[bool, int]]
) -> None:
    if not _direct_here(tmp_path):
        pytest.skip("the file system of the temporary folder has no direct writes")
    write(tmp_path / "file")
    assert writes == [(True, PIECE), (True, PIECE), (False, 12_345)]
    assert (tmp_path / "file").read_bytes() == DATA


def _direct_here(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1])
def test_every_size_is_written_whole_over_what_was_there(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(DATA)
    write(tmp_path / "file", DATA[:size])
    assert (tmp_path / "file").read_bytes() == DATA[:size]


def refuse_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def opened(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", opened)


def refuse_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def written(descriptor: int, data: memoryview) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", written)


def cut_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:100_000]))


def know_no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_DIRECT", 0)


@needs_direct
@pytest.mark.parametrize("fault", [refuse_open, refuse_writes, cut_writes, know_no_direct])
def test_where_that_cannot_be_the_file_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with monkeypatch.context() as patch:
        fault(patch)
        write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_that_says_so() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write(Path("/dev/full"))


def test_a_new_file_has_the_rights_that_any_other_has(tmp_path: Path) -> None:
    write(tmp_path / "file")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
