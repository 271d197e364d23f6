"""A model that several processes share is saved while training goes on: the same bits, old or new after a kill."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openelm.files.published import verify_folder
from openelm.train import saving
from openelm.train.checkpoint import checkpoint_folder, checkpoint_steps
from openelm.train.ledger import read_ledger

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SHARED = ("train.rows=8", "data.lanes=4", "train.timeout_seconds=20", "train.shard_processes=2")
BACKGROUND = (*SHARED, "checkpoints.background=true")


@pytest.fixture(scope="module")
def foreground(launch: Any, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes -> a run that waits for its saves: one copy of two parts, and two copies (hybrid)."""
    folders = {count: tmp_path_factory.mktemp("foreground") / "run" for count in (2, 4)}
    for count, folder in folders.items():
        launch.run(folder, count, *SHARED)
    return folders


def assert_same(bench: Any, folder: Path, expected: Path) -> None:
    assert bench.fingerprint(folder) == bench.fingerprint(expected)
    assert bench.history(folder) == bench.history(expected)
    assert checkpoint_steps(folder) == checkpoint_steps(expected)
    assert not list((folder / "checkpoints").glob(".*"))
    assert saved(bench, folder).items() <= saved(bench, expected).items()


def saved(bench: Any, folder: Path) -> dict[int, tuple[str, str]]:
    events = bench.events(folder, "checkpoint")
    return {event["step"]: (event["weights_sha256"], event["optimizer_sha256"]) for event in events}


def slow(stage: str, seconds: float = 0.2) -> Callable[[], None]:
    """Make a stage of saving take long, in the process that calls this."""

    def install() -> None:
        plain = getattr(saving, stage)

        def slowly(*arguments: Any) -> Any:
            time.sleep(seconds)
            return plain(*arguments)

        setattr(saving, stage, slowly)

    return install


@pytest.mark.parametrize("count", [2, 4])
def test_training_goes_on_while_parts_are_written_and_every_bit_is_the_same(
    bench: Any, launch: Any, foreground: dict[int, Path], tmp_path: Path, count: int
) -> None:
    """The part of one process and the first one's second look take longer than a step each."""
    launch.run(tmp_path / "run", count, *BACKGROUND, before={1: slow("write_part"), 0: slow("load_checkpoint")})
    assert_same(bench, tmp_path / "run", foreground[count])
    assert saved(bench, tmp_path / "run") == saved(bench, foreground[count])
    order = [(event["event"], event.get("step")) for event in read_ledger(tmp_path / "run" / "ledger.jsonl")]
    for step in (3, 6, 9):
        assert order.index(("checkpoint", step)) > order.index(("step", step + 1))
    for step in (3, 6):  # at most one is being written
        assert order.index(("checkpoint", step)) < order.index(("step", step + 4))


def deadly(stage: str, call: int, *, after: bool = False) -> Callable[[], None]:
    """Kill the process that calls this when a stage of saving is reached for the n-th time, or has been."""

    def install() -> None:
        plain, calls = getattr(saving, stage), 0

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = plain(*arguments)
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(saving, stage, counted)

    return install


@pytest.mark.parametrize(
    ("rank", "stage", "after", "newest"),
    [
        (1, "write_part", True, 3),
        (0, "write_state", False, 3),
        (0, "load_checkpoint", False, 6),
    ],
)
def test_a_process_killed_in_the_midst_of_a_save_leaves_the_old_or_the_new(
    bench: Any,
    launch: Any,
    foreground: dict[int, Path],
    tmp_path: Path,
    rank: int,
    stage: str,
    after: bool,
    newest: int,
) -> None:
    processes = launch.start(tmp_path / "run", 2, *BACKGROUND, before={rank: deadly(stage, 2, after=after)})
    endings = [process.communicate()[1] for process in processes]
    assert processes[rank].returncode == -signal.SIGKILL
    assert processes[1 - rank].returncode == 75, endings[1 - rank]
    assert "E_PROCESS" in endings[1 - rank] and f"process {rank}" in endings[1 - rank]
    assert checkpoint_steps(tmp_path / "run")[-1] == newest
    verify_folder(checkpoint_folder(tmp_path / "run", newest))
    launch.run(tmp_path / "run", 2, *BACKGROUND)
    assert [event["step"] for event in bench.events(tmp_path / "run", "resume")] == [newest]
    assert_same(bench, tmp_path / "run", foreground[2])


@pytest.mark.faults
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("moment", range(8))
def test_any_process_killed_at_any_disk_call_leaves_the_old_or_the_new(
    bench: Any, launch: Any, foreground: dict[int, Path], tmp_path: Path, count: int, moment: int
) -> None:
    """At syncs and renames all over the run, of which the first process makes the most."""
    rank = moment % count
    at = 1 + moment // count * (6 if rank == 0 else 2)

    def install() -> None:
        calls = 0

        def counting(call: Any) -> Any:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return counted

        for name in ("fsync", "rename", "replace"):
            setattr(os, name, counting(getattr(os, name)))

    processes = launch.start(tmp_path / "run", count, *BACKGROUND, before={rank: install})
    for process in processes:
        process.communicate()
    assert processes[rank].returncode == -signal.SIGKILL or rank >= 2, "a second copy of the model is not written"
    for step in checkpoint_steps(tmp_path / "run"):
        verify_folder(checkpoint_folder(tmp_path / "run", step))
    launch.run(tmp_path / "run", count, *BACKGROUND)
    assert_same(bench, tmp_path / "run", foreground[count])


@pytest.mark.parametrize(("settings", "rank"), [(BACKGROUND, 0), (BACKGROUND, 1), (SHARED, 1)])
def test_a_full_disk_of_one_process_stops_all_and_costs_no_older_checkpoint(
    bench: Any, launch: Any, foreground: dict[int, Path], tmp_path: Path, settings: tuple[str, ...], rank: int
) -> None:
    """A file size limit, as `ulimit -f` sets it, from the second save on: too little for a part."""

    def install() -> None:
        plain, calls = saving.write_part, iter(range(99))

        def limited(*arguments: Any) -> None:
            if next(calls) == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            plain(*arguments)

        saving.write_part = limited

    processes = launch.start(tmp_path / "run", 2, *settings, before={rank: install})
    endings = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [5 if n == rank else 75 for n in (0, 1)], endings
    assert "E_DISK" in endings[rank] and "File too large" in endings[rank]
    assert f"process {rank} could not save the checkpoint" in endings[1 - rank]
    assert checkpoint_steps(tmp_path / "run") == [3]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    launch.run(tmp_path / "run", 2, *settings)
    assert_same(bench, tmp_path / "run", foreground[2])
