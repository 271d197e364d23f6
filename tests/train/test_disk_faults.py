"""A disk that refuses any one write of a run: one clear error, whole checkpoints, and the same bits afterwards."""

from __future__ import annotations

import builtins
import errno
import io
import os
import pathlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openelm.errors import OpenELMError
from openelm.files.published import verify_folder
from openelm.train.checkpoint import checkpoint_folder, checkpoint_steps

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Disk:
    """Counts what a process asks of the disk below a folder, and refuses the k-th demand.

    Demands are opening for writing, each write and flush, truncating, syncing, renaming and making folders. A refused
    write has written half of its bytes, as a disk does that fills up.
    """

    def __init__(self, folder: Path, refuse: int, error: int) -> None:
        self.folder, self.refuse, self.error, self.count = str(folder), refuse, error, 0

    def demand(self, before: Callable[[], Any] = lambda: None) -> None:
        self.count += 1
        if self.count - 1 == self.refuse:
            before()
            raise OSError(self.error, os.strerror(self.error), self.folder)

    def install(self) -> None:
        """Stand between this process and its files, for good: only for a process that ends soon."""
        plain_open = io.open

        def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            inside = isinstance(path, (str, os.PathLike)) and str(path).startswith(self.folder)
            if not inside or not set(mode) & set("wax+"):
                return plain_open(path, mode, *arguments, **options)
            self.demand()
            return Writer(plain_open(path, mode, *arguments, **options), self)

        io.open = builtins.open = opened  # type: ignore[assignment]
        if hasattr(pathlib, "io"):
            pathlib.io.open = opened
        for name in ("fsync", "rename", "replace", "mkdir"):
            setattr(os, name, self._guarded(name, getattr(os, name)))

    def _guarded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            if name != "mkdir" or not os.path.isdir(arguments[0]):  # one that is there needs nothing of the disk
                self.demand()
            return call(*arguments, **options)

        return guarded


class Writer:
    """A file whose writes may be refused."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        self._disk.demand(lambda: (self._file.write(data[: len(data) // 2]), self._file.flush()))
        written: int = self._file.write(data)
        return written

    def flush(self) -> None:
        self._disk.demand()
        self._file.flush()

    def truncate(self, size: int) -> None:
        self._disk.demand()
        self._file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def train_on_a_bad_disk(bench: Any, folder: Path, refuse: int, error: int) -> tuple[int, str, int]:
    """Train in a fork; returns (exit code, what it said, demands made)."""
    log = folder.with_suffix(".log")
    process = os.fork()
    if process == 0:
        code, said, disk = 1, "", Disk(folder, refuse, error)
        try:
            with log.open("w") as report:
                disk.install()
                try:
                    bench.train(folder)
                    code = 0
                except OpenELMError as failure:
                    code, said = failure.exit_code, str(failure)
                except BaseException:
                    said = traceback.format_exc()
                report.write(f"{disk.count}\n{said}")
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    count, _, said = log.read_text().partition("\n")
    return code, said, int(count)


def assert_survived(bench: Any, folder: Path, undisturbed: Path, refuse: int, error: int) -> None:
    code, said, _ = train_on_a_bad_disk(bench, folder, refuse, error)
    assert code == 5, (refuse, said)
    assert said.startswith("error[E_DISK]") and "\n" not in said, (refuse, said)
    for step in checkpoint_steps(folder):
        verify_folder(checkpoint_folder(folder, step))
    bench.train(folder)
    assert bench.fingerprint(folder) == bench.fingerprint(undisturbed), refuse
    assert bench.history(folder) == bench.history(undisturbed), refuse


@pytest.fixture(scope="module")
def demands(bench: Any, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often an undisturbed run asks something of the disk."""
    code, said, count = train_on_a_bad_disk(bench, tmp_path_factory.mktemp("demands") / "run", -1, errno.ENOSPC)
    assert code == 0, said
    assert count > 100
    return count


@pytest.mark.parametrize("part", range(8))
def test_a_run_survives_a_full_disk(bench: Any, undisturbed: Path, demands: int, tmp_path: Path, part: int) -> None:
    """At one write in every eighth of the run."""
    refuse = (2 * part + 1) * demands // 16
    assert_survived(bench, tmp_path / "run", undisturbed, refuse, errno.ENOSPC)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_a_run_survives_any_refused_write(
    bench: Any, undisturbed: Path, demands: int, tmp_path: Path, error: int, part: int
) -> None:
    for refuse in range(part, demands, 8):
        assert_survived(bench, tmp_path / str(refuse), undisturbed, refuse, error)
