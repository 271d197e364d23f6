"""A reader of the disk sees all of the old or all of the new, and damage never passes a check."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openelm.errors import CheckpointError, DiskError
from openelm.files import atomic
from openelm.files.atomic import make_folder, remove_folder, remove_leftovers, write_atomic
from openelm.files.hashes import canonical_json, sha256_bytes, sha256_file
from openelm.files.locks import folder_lock
from openelm.files.published import MANIFEST, publish_folder, verify_folder

ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def failing(code: int) -> Callable[..., Any]:
    """Make a function that raises an OSError."""

    def call(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return call


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def publish(target: Path, text: str, *, replace: bool = False) -> None:
    with publish_folder(target, replace=replace) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "b.bin").write_bytes(bytes(range(256)))


def test_hashes_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_bytes(b"abc") == sha256_file(tmp_path / "abc") == ABC_SHA256


def test_a_file_longer_than_one_read_is_hashed_whole(tmp_path: Path) -> None:
    data = random.Random(0).randbytes((1 << 20) * 2 + 7)
    (tmp_path / "long").write_bytes(data)
    assert sha256_file(tmp_path / "long") == sha256_bytes(data)


def test_canonical_json_does_not_depend_on_order_and_refuses_what_is_not_json() -> None:
    assert canonical_json({"b": [1, 0.5], "a": "é"}) == canonical_json({"a": "é", "b": [1, 0.5]})
    assert canonical_json({"b": 1, "a": "é"}) == b'{"a":"\\u00e9","b":1}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_write_atomic_makes_and_replaces(tmp_path: Path) -> None:
    for data in (b"old", b"", b"new\0"):
        write_atomic(tmp_path / "f", data)
        assert content(tmp_path) == {"f": data}


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES"])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: str
) -> None:
    write_atomic(tmp_path / "f", b"old")
    monkeypatch.setattr(os, call, failing(getattr(errno, code)))
    with pytest.raises(DiskError) as caught:
        write_atomic(tmp_path / "f", b"new")
    assert caught.value.exit_code == 5
    assert caught.value.file == tmp_path / "f"
    assert caught.value.fix
    assert content(tmp_path) == {"f": b"old"}


def test_a_failure_that_is_no_disk_trouble_passes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EBADF))
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        write_atomic(tmp_path / "f", b"new")
    assert content(tmp_path) == {}


def test_make_folder_says_what_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DiskError, match=r"in the way|is a file"):
            make_folder(path)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_inside_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), publish_folder(tmp_path / "t") as folder:
        (folder / "a").touch()
        raise error
    assert content(tmp_path) == {}


def test_a_full_disk_inside_is_a_disk_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=os.strerror(errno.ENOSPC)), publish_folder(tmp_path / "t"):
        raise OSError(errno.ENOSPC, "full")
    assert content(tmp_path) == {}


def test_an_existing_folder_is_refused_untouched(tmp_path: Path) -> None:
    publish(tmp_path / "t", "one")
    before = content(tmp_path / "t")
    with pytest.raises(CheckpointError, match="exists already"):
        publish(tmp_path / "t", "two")
    assert content(tmp_path / "t") == before
    assert os.listdir(tmp_path) == ["t"]


def test_replacing_keeps_the_old_until_the_new_is_complete(tmp_path: Path) -> None:
    publish(tmp_path / "t", "one")
    with publish_folder(tmp_path / "t", replace=True) as folder:
        (folder / "a.txt").write_text("two")
        assert (tmp_path / "t" / "a.txt").read_text() == "one"
        verify_folder(tmp_path / "t")
    assert content(tmp_path / "t").keys() == {"a.txt", MANIFEST}
    assert (tmp_path / "t" / "a.txt").read_text() == "two"
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("call", ["rename", "replace", "fsync"])
@pytest.mark.parametrize("after", range(5))
def test_a_failure_at_any_step_leaves_the_old_or_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    publish(tmp_path / "t", "one")
    real, calls = getattr(os, call), []

    def maybe(*arguments: Any, **options: Any) -> Any:
        calls.append(call)
        if len(calls) == after + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, maybe)
        try:
            publish(tmp_path / "t", "two", replace=True)
        except DiskError as error:
            failed = error.exit_code == 5
        else:
            failed = False
    verify_folder(tmp_path / "t")
    assert (tmp_path / "t" / "a.txt").read_text() in (("one", "two") if failed else ("two",))
    assert os.listdir(tmp_path) == ["t"]


KILLED = """
import os, sys
from pathlib import Path
from openelm.files.published import publish_folder
target, step = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def killed_before(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == step:
            os._exit(9)
        return real(*arguments, **options)
    return call
for name in ("rename", "replace", "fsync", "rmdir"):
    setattr(os, name, killed_before(getattr(os, name)))
with publish_folder(target, replace=True) as folder:
    (folder / "a.txt").write_text("two")
"""


def test_a_process_killed_at_any_step_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    target, outcomes = tmp_path / "t", []
    for step in range(1, 30):
        shutil.rmtree(target, ignore_errors=True)
        publish(target, "one")
        done = subprocess.run([sys.executable, "-c", KILLED, target, str(step)], timeout=60)
        remove_leftovers(tmp_path)
        verify_folder(target)
        assert os.listdir(tmp_path) == ["t"]
        outcomes.append((target / "a.txt").read_text())
        if done.returncode == 0:
            break
        assert done.returncode == 9
    assert outcomes == sorted(outcomes) and set(outcomes) == {"one", "two"}
    assert outcomes.count("one") >= 5


def test_leftovers_of_other_processes_go_and_everything_else_stays(tmp_path: Path) -> None:
    publish(tmp_path / "t", "one")
    shutil.copytree(tmp_path / "t", tmp_path / ".t.tmp-123")
    shutil.copytree(tmp_path / "t", tmp_path / ".t.old-123")
    (tmp_path / ".run.json.tmp-77").write_text("half")
    for name in (".hidden", "t.tmp-1", "run.json", ".lock"):
        (tmp_path / name).write_text("mine")
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".lock", "run.json", "t", "t.tmp-1"]
    verify_folder(tmp_path / "t")


def test_an_old_folder_without_a_successor_comes_back(tmp_path: Path) -> None:
    publish(tmp_path / "step.old-1", "one")
    (tmp_path / "step.old-1").rename(tmp_path / ".step.old-1.old-99")
    (tmp_path / ".step.old-1.tmp-99").mkdir()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["step.old-1"]
    verify_folder(tmp_path / "step.old-1")


def test_a_removed_folder_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "t", "one")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", failing(errno.EIO))
        with pytest.raises(DiskError):
            remove_folder(tmp_path / "t")
    assert not (tmp_path / "t").exists()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == []


LOCK = """
import sys
from pathlib import Path
from openelm.errors import CheckpointError
from openelm.files.locks import folder_lock
try:
    with folder_lock(Path(sys.argv[1])):
        print("held")
except CheckpointError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def lock_elsewhere(folder: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", LOCK, folder], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.strip()


def test_a_second_process_is_refused_with_the_owners_name_until_the_first_lets_go(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        code, line = lock_elsewhere(tmp_path)
        assert code == 4
        assert f"process {os.getpid()} is using this folder" in line
        with pytest.raises(CheckpointError, match="is using"), folder_lock(tmp_path):
            pass
    assert lock_elsewhere(tmp_path) == (0, "held")


def test_a_lock_goes_with_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), folder_lock(tmp_path):
        raise RuntimeError
    with folder_lock(tmp_path):
        pass


def test_a_lock_where_one_may_not_write_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", failing(errno.EACCES))
    with pytest.raises(DiskError), folder_lock(tmp_path):
        pass
