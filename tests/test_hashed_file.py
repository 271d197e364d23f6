"""A file that is hashed while it is written says what one says that is read afterwards."""

from __future__ import annotations

import errno
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm.files import hashed
from openelm.files.hashed import HashedFile
from openelm.files.hashes import facts_of_file

MIB = 1 << 20


@settings(deadline=None, max_examples=40)
@given(size=st.one_of(st.integers(0, 5000), st.integers(4 * MIB - 2, 4 * MIB + 2)), cuts=st.lists(st.floats(0, 1)))
def test_its_facts_are_those_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, size: int, cuts: list[float]
) -> None:
    path, data = tmp_path_factory.mktemp("hashed") / "file", os.urandom(size)
    places = sorted({0, size, *(int(cut * size) for cut in cuts)})
    with HashedFile(path, size) as file:
        for start, end in pairwise(places):
            file.write(data[start:end])
            assert file.end == end
    assert path.read_bytes() == data
    assert file.facts.to_json() == facts_of_file(path).to_json()


def test_it_goes_to_the_disk_while_it_is_written_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    path, real = tmp_path / "file", os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(hashed, "_SYNC_BYTES", MIB)
    with HashedFile(path, 40 * MIB) as file:
        for _ in range(40):
            file.write(bytes(MIB))
    assert synced[-1] == 40 * MIB
    assert 2 <= len(synced) <= 41


@pytest.mark.parametrize("refused", [1, 2], ids=["while it is written", "at the end"])
def test_a_disk_that_refuses_is_an_error_and_no_thread_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    before, calls, real = threading.active_count(), 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(hashed, "_SYNC_BYTES", MIB)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), HashedFile(tmp_path / "file", MIB) as file:
        file.write(bytes(MIB))
    assert threading.active_count() == before


def test_what_went_wrong_in_the_block_is_what_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), HashedFile(tmp_path / "file", 10 * MIB) as file:
        file.write(bytes(MIB))
        raise ZeroDivisionError
