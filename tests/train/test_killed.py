"""Real processes, really killed: `python -m openelm train` and what its next start makes of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

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


def start(recipe: Path, folder: Path, environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "openelm", "train", str(recipe), "--out", str(folder), *more]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )


def wait_for_growth(process: subprocess.Popen[str], ledger: Path, more_bytes: int) -> None:
    """Return when the process has written so many more bytes to the ledger, or has ended."""
    first = ledger.stat().st_size if ledger.exists() else 0
    limit = time.monotonic() + _WAIT_SECONDS
    while process.poll() is None and time.monotonic() < limit:
        if ledger.exists() and ledger.stat().st_size >= first + more_bytes:
            return
        time.sleep(0.0005)


def kill_at_random_moments(
    recipe: Path, folder: Path, environment: dict[str, str], draw: random.Random, kills: int
) -> int:
    """Kill starts of a run until it was killed so often or it ended; returns the number of kills."""
    for killed in range(kills):
        process = start(recipe, folder, environment)
        wait_for_growth(process, folder / "ledger.jsonl", draw.randrange(1, 12_000))
        if draw.random() < 0.5:
            time.sleep(draw.random() * 0.02)
        process.kill()
        process.communicate()
        if process.returncode == 0:
            return killed
        assert process.returncode == -signal.SIGKILL
    return kills


def finish(recipe: Path, folder: Path, environment: dict[str, str]) -> None:
    process = start(recipe, folder, environment)
    _, stderr = process.communicate(timeout=_WAIT_SECONDS)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr


def assert_same(bench: Any, folder: Path, expected: Path) -> None:
    assert bench.fingerprint(folder, STEPS) == bench.fingerprint(expected, STEPS)
    assert bench.history(folder) == bench.history(expected)
    assert [step for step, *_ in bench.history(folder)] == list(range(1, STEPS + 1))
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_run_killed_five_times_at_random_moments_ends_with_the_same_bits(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    assert kill_at_random_moments(recipe, tmp_path, environment, random.Random(0), kills=5) > 0
    finish(recipe, tmp_path, environment)
    assert_same(bench, tmp_path, expected)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(1, 6))
def test_runs_killed_many_times_end_with_the_same_bits(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str], seed: int
) -> None:
    draw, kills = random.Random(seed), 0
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        kills += kill_at_random_moments(recipe, folder, environment, draw, kills=6)
        finish(recipe, folder, environment)
        assert_same(bench, folder, expected)
        shutil.rmtree(folder)
        if kills >= 20:
            break
    assert kills >= 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_says_so_in_one_line_and_exits_75(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    process = start(recipe, tmp_path, environment)
    wait_for_growth(process, tmp_path / "ledger.jsonl", 4_000)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=_WAIT_SECONDS)
    assert process.returncode == 75, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("openelm: error[E_STOPPED]")
    assert number.name in line
    assert "run the same command again" in line
    (stop,) = bench.events(tmp_path, "stop")
    assert stop["reason"] == number.name
    assert f"step {stop['step']}" in line
    assert max(event["step"] for event in bench.events(tmp_path, "step")) == stop["step"]
    assert [event["step"] for event in bench.events(tmp_path, "checkpoint")][-1] == stop["step"]
    bench.train(tmp_path, f"train.steps={STEPS}", "checkpoints.every=5")
    assert [event["step"] for event in bench.events(tmp_path, "resume")] == [stop["step"]]
    assert_same(bench, tmp_path, expected)


def test_a_stop_signal_reaches_a_run_that_reads_with_a_worker_process(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """The signal goes to the whole group, as Ctrl-C does; the worker must not answer it."""
    command = [sys.executable, "-m", "openelm", "train", str(recipe), "--out", str(tmp_path), "data.workers=1"]
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_growth(process, tmp_path / "ledger.jsonl", 4_000)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=_WAIT_SECONDS)
    assert process.returncode == 75, stderr
    assert len(stderr.splitlines()) == 1
    bench.train(tmp_path, f"train.steps={STEPS}", "checkpoints.every=5", "data.workers=1")
    assert bench.fingerprint(tmp_path, STEPS)[:2] == bench.fingerprint(expected, STEPS)[:2]


def test_a_file_size_limit_is_exit_5_in_one_line_and_nothing_saved_is_lost(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    bench.train_until(tmp_path, 7, f"train.steps={STEPS}", "checkpoints.every=5")
    command = f"ulimit -f 20; exec {sys.executable} -m openelm train {recipe} --out {tmp_path}"  # blocks of 1 KiB
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == 5
    (line,) = done.stderr.splitlines()
    assert line.startswith("openelm: error[E_DISK]")
    finish(recipe, tmp_path, environment)
    assert_same(bench, tmp_path, expected)


def test_a_ledger_that_cannot_grow_is_exit_5_too(
    bench: Any, recipe: Path, expected: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    bench.train_until(tmp_path, 7, f"train.steps={STEPS}", "checkpoints.every=5")
    size = (tmp_path / "ledger.jsonl").stat().st_size
    blocks = size // 1024 + 2
    command = f"ulimit -f {blocks}; exec {sys.executable} -m openelm train {recipe} --out {tmp_path}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == 5
    bench.train(tmp_path, f"train.steps={STEPS}", "checkpoints.every=5")
    assert_same(bench, tmp_path, expected)
