"""Real processes, really killed: `python -m openelm train` and what its next start makes of it."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openelm.train.ledger import Ledger

from .forks import Fork

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

STEPS = 40
_WAIT_SECONDS = 120.0


@pytest.fixture(scope="module")
def recipe(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    values = bench.values(f"train.steps={STEPS}", "checkpoints.every=5")
    source = values["data"].pop("sources")[0]
    tables = {**values, "[data.sources]": source}
    text = ""
    for table, entries in tables.items():
        text += f"[{table}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in entries.items())
    path.write_text(text)
    return path


def _toml(value: Any) -> str:
    return repr(value).replace("'", '"')


@pytest.fixture(scope="module")
def expected(bench: Any, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expected") / "run"
    bench.train(folder, f"train.steps={STEPS}", "checkpoints.every=5")
    return folder


Start = Callable[..., Any]


def start_python(recipe: Path, folder: Path, environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    """Start `python -m openelm train`, at the head of its own process group."""
    command = [sys.executable, "-m", "openelm", "train", str(recipe), "--out", str(folder), *more]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def fork(recipe: Path, folder: Path, environment: dict[str, str], *more: str, **options: Any) -> Fork:
    return Fork(["train", str(recipe), "--out", str(folder), *more], environment, **options)


def wait_for_growth(process: Any, ledger: Path, more_bytes: int) -> None:
    """Return when the process has written so many more bytes to the ledger, or has ended."""
    first = ledger.stat().st_size if ledger.exists() else 0
    limit = time.monotonic() + _WAIT_SECONDS
    while process.poll() is None and time.monotonic() < limit:
        if ledger.exists() and ledger.stat().st_size >= first + more_bytes:
            return
        time.sleep(0.0005)


def kill_at_random_moments(
    start: Start, recipe: Path, folder: Path, environment: dict[str, str], draw: random.Random, kills: int, *more: str
) -> int:
    """Kill starts of a run until it was killed so often or it ended; returns the number of kills."""
    for killed in range(kills):
        process = start(recipe, folder, environment, *more)
        wait_for_growth(process, folder / "ledger.jsonl", draw.randrange(1, 12_000))
        if draw.random() < 0.5:
            time.sleep(draw.random() * 0.02)
        process.kill()
        process.communicate()
        if process.returncode == 0:
            return killed
        assert process.returncode == -signal.SIGKILL
    return kills


def finish(recipe: Path, folder: Path, environment: dict[str, str], *more: str) -> None:
    process = fork(recipe, folder, environment, *more)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")


def assert_same(bench: Any, folder: Path, expected: Path) -> None:
    assert bench.fingerprint(folder, STEPS) == bench.fingerprint(expected, STEPS)
    assert bench.history(folder) == bench.history(expected)
    assert [step for step, *_ in bench.history(folder)] == list(range(1, STEPS + 1))
    assert not list((folder / "checkpoints").glob(".*"))


def assert_little_was_lost(bench: Any, folder: Path, interval: int) -> None:
    for event in bench.events(folder, "rewind"):
        assert event["step"] - event["to"] <= interval


WAYS: list[tuple[str, ...]] = [(), ("checkpoints.background=true",), ("data.workers=1",), *[()] * 7]
"""How a run may read and save; none of it shows in the result."""


def kill_and_compare(
    bench: Any, recipe: Path, expected: Path, folder: Path, environment: dict[str, str], draw: random.Random, *more: str
) -> None:
    """Kill a run one to three times at random moments, finish it and compare."""
    while not kill_at_random_moments(fork, recipe, folder, environment, draw, draw.randint(1, 3), *more):
        shutil.rmtree(folder)  # it ended before it could be killed
    finish(recipe, folder, environment, *more)
    assert_same(bench, folder, expected)
    assert_little_was_lost(bench, folder, 10 if "checkpoints.background=true" in more else 5)


@pytest.mark.parametrize("way", range(5))
def test_runs_killed_at_random_moments_end_with_the_same_bits(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str], way: int
) -> None:
    kill_and_compare(bench, recipe, expected, tmp_path / "run", environment, random.Random(way), *WAYS[way])


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 11))
def test_two_hundred_killed_runs_end_with_the_same_bits(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str], seed: int
) -> None:
    """Ten seeds of twenty runs: sixteen plain, two that save in the background, two that read with a worker."""
    draw = random.Random(seed)
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        kill_and_compare(bench, recipe, expected, folder, environment, draw, *WAYS[attempt % len(WAYS)])
        shutil.rmtree(folder)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(5))
def test_fifty_runs_stopped_at_random_moments_end_with_the_same_bits(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str], seed: int
) -> None:
    """Each is sent one to three different stop signals, some of them while it saves."""
    draw, stops = random.Random(seed), 0
    for attempt in range(10):
        folder, way = tmp_path / str(attempt), WAYS[attempt % len(WAYS)]
        process = fork(recipe, folder, environment, *way)
        wait_for_growth(process, folder / "ledger.jsonl", draw.randrange(1, 12_000))
        for number in draw.sample([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], draw.randint(1, 3)):
            process.send_signal(number)
            time.sleep(draw.random() * 0.01)
        _, stderr = process.communicate()
        ends = (0, 75, 130, -signal.SIGTERM, -signal.SIGUSR1)  # the last ones: before training began, or after it
        assert process.returncode in ends, stderr
        stops += process.returncode == 75
        for event in bench.events(folder, "stop"):
            assert max(line["step"] for line in bench.events(folder, "step")) == event["step"]
        finish(recipe, folder, environment, *way)
        assert_same(bench, folder, expected)
        assert_little_was_lost(bench, folder, 0)
        shutil.rmtree(folder)
    assert stops >= 5


@pytest.mark.slow
def test_the_command_itself_killed_many_times_ends_with_the_same_bits(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """`python -m openelm train`, with its imports, in a process of its own."""
    draw, kills = random.Random(1), 0
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        kills += kill_at_random_moments(start_python, recipe, folder, environment, draw, kills=6)
        finish(recipe, folder, environment)
        assert_same(bench, folder, expected)
    assert kills >= 5


def assert_stopped(bench: Any, process: Any, stderr: str, folder: Path, expected: Path, name: str, *more: str) -> None:
    assert process.returncode == 75, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("openelm: error[E_STOPPED]")
    assert name in line
    assert "run the same command again" in line
    (stop,) = bench.events(folder, "stop")
    assert stop["reason"] == name
    assert f"step {stop['step']}" in line
    assert max(event["step"] for event in bench.events(folder, "step")) == stop["step"]
    assert [event["step"] for event in bench.events(folder, "checkpoint")][-1] == stop["step"]
    bench.train(folder, f"train.steps={STEPS}", "checkpoints.every=5", *more)
    assert [event["step"] for event in bench.events(folder, "resume")] == [stop["step"]]
    assert_same(bench, folder, expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_saves_says_so_in_one_line_and_exits_75(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    process = fork(recipe, tmp_path, environment)
    wait_for_growth(process, tmp_path / "ledger.jsonl", 4_000)
    os.kill(process.pid, number)
    _, stderr = process.communicate()
    assert_stopped(bench, process, stderr, tmp_path, expected, number.name)


def test_ctrl_c_stops_a_run_that_reads_with_a_worker_process(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """The signal goes to the whole group, as a terminal sends it; the worker must not answer it."""
    process = start_python(recipe, tmp_path, environment, "data.workers=1")
    wait_for_growth(process, tmp_path / "ledger.jsonl", 4_000)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=_WAIT_SECONDS)
    assert_stopped(bench, process, stderr, tmp_path, expected, "SIGINT", "data.workers=1")


@pytest.mark.parametrize("kind", ["checkpoint", "ledger"])
def test_a_file_size_limit_is_exit_5_in_one_line_and_nothing_saved_is_lost(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str], kind: str
) -> None:
    """Like `ulimit -f`: first too little for the weights, then enough for them but not for a longer ledger."""
    settings = (f"train.steps={STEPS}", "checkpoints.every=5")
    bench.train_until(tmp_path, 7, *settings)
    if kind == "ledger":  # padded by events until it is larger than any file of a checkpoint
        with Ledger(tmp_path / "ledger.jsonl") as ledger:
            ledger.append({"event": "sample", "step": 5, "prompt": "", "text": "x" * 1_000_000})
    limit = 20_000 if kind == "checkpoint" else (tmp_path / "ledger.jsonl").stat().st_size + 3_000
    process = fork(
        recipe, tmp_path, environment, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, stderr = process.communicate()
    assert "Traceback" not in stderr, stderr[-2000:]
    assert process.returncode == 5
    (line,) = stderr.splitlines()
    assert line.startswith("openelm: error[E_DISK]")
    finish(recipe, tmp_path, environment)
    assert_same(bench, tmp_path, expected)
