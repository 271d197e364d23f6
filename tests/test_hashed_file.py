"""A file that is hashed while it is written says what one says that is read afterwards."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_the_disk_has_it_when_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    with HashedFile(tmp_path / "file", 9 * MIB + 1) as file:
        file.write(bytes(9 * MIB + 1))
    assert synced == [9 * MIB + 1]


@pytest.mark.parametrize("refused", [os.write, os.fsync], ids=["while it is written", "at the end"])
def test_a_disk_that_refuses_is_an_error_and_no_thread_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., object]
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = threading.active_count()
    monkeypatch.setattr(os, refused.__name__, refuse)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), HashedFile(tmp_path / "file", 9 * MIB) as file:
        file.write(bytes(9 * MIB))
    assert threading.active_count() == before


def test_what_went_wrong_in_the_block_is_what_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), HashedFile(tmp_path / "file", 10 * MIB) as file:
        file.write(bytes(MIB))
        raise ZeroDivisionError
