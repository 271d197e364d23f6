"""A run that was broken off anywhere ends with the same bits as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.model.folder import weights_sha256
from openelm.train.checkpoint import checkpoint_folder, checkpoint_steps
from openelm.train.ledger import read_ledger, valid_events

STEPS = 12


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_a_run_broken_off_at_any_step_ends_with_the_same_bits(
    bench: Any, undisturbed: Path, tmp_path: Path, stop: int
) -> None:
    bench.train_until(tmp_path, stop)
    bench.train(tmp_path)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)
    assert bench.history(tmp_path) == bench.history(undisturbed)
    assert [step for step, *_ in bench.history(tmp_path)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("every", [1, 3, 5])
def test_the_checkpoint_interval_does_not_show_in_the_result(
    bench: Any, undisturbed: Path, tmp_path: Path, every: int
) -> None:
    interval = f"checkpoints.every={every}"
    bench.train_until(tmp_path, 4, interval)
    bench.train_until(tmp_path, 8, interval)
    bench.train(tmp_path, interval)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)
    assert bench.history(tmp_path) == bench.history(undisturbed)


def test_a_run_broken_off_many_times_without_progress_still_ends_the_same(
    bench: Any, undisturbed: Path, tmp_path: Path
) -> None:
    for stop in (2, 1, 4, 4, 5, 11, 10, 12):
        bench.train_until(tmp_path, stop)
    bench.train(tmp_path)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)
    assert bench.history(tmp_path) == bench.history(undisturbed)


@pytest.mark.parametrize("step", [3, 9, STEPS])
def test_a_run_broken_off_after_a_save_before_the_next_line_ends_the_same(
    bench: Any, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    bench.train_until(tmp_path, step, kind="checkpoint")
    bench.train(tmp_path)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)
    assert bench.history(tmp_path) == bench.history(undisturbed)


def test_a_run_broken_off_between_its_last_save_and_its_end_is_finished_by_the_next_start(
    bench: Any, tmp_path: Path
) -> None:
    bench.train_until(tmp_path, STEPS, kind="checkpoint")
    bench.train(tmp_path)
    finished = bench.events(tmp_path, "finish")
    assert [event["step"] for event in finished] == [STEPS]
    assert finished[0]["seconds"] > 0


def test_starting_a_finished_run_again_changes_nothing(bench: Any, tmp_path: Path) -> None:
    model = bench.train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    again = bench.train(tmp_path)
    assert weights_sha256(again.state_dict()) == weights_sha256(model.state_dict())
    assert before == {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"
    }


def test_the_returned_model_has_the_weights_of_the_last_checkpoint(bench: Any, tmp_path: Path) -> None:
    model = bench.train(tmp_path)
    assert weights_sha256(model.state_dict()) == bench.fingerprint(tmp_path)[0]


def test_a_finished_run_can_be_made_longer(bench: Any, tmp_path: Path) -> None:
    constant = ("schedule.shape=warmup-stable-decay", "schedule.final_fraction=1.0")
    bench.train(tmp_path / "long", "train.steps=18", *constant)
    bench.train(tmp_path / "short", *constant)
    bench.train(tmp_path / "short", "train.steps=18", *constant, allow_change=["train.steps"])
    assert bench.history(tmp_path / "short") == bench.history(tmp_path / "long")
    assert bench.fingerprint(tmp_path / "short", 18) == bench.fingerprint(tmp_path / "long", 18)
    assert bench.events(tmp_path / "short", "resume"), "observers learn of a new start from this event"


def test_a_resume_with_worker_processes_gives_the_same_bits_as_none(
    bench: Any, undisturbed: Path, tmp_path: Path
) -> None:
    bench.train_until(tmp_path, 7, "data.workers=1")
    bench.train(tmp_path, "data.workers=1")
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def test_the_global_generator_has_no_part_in_the_result(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        bench.train(tmp_path)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)


def test_another_seed_gives_other_weights_and_other_batches(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    bench.train(tmp_path, "train.seed=1")
    assert bench.fingerprint(tmp_path)[0] != bench.fingerprint(undisturbed)[0]
    assert not {row[-1] for row in bench.history(tmp_path)} & {row[-1] for row in bench.history(undisturbed)}


def test_a_ledger_older_than_the_checkpoints_is_refused(bench: Any, tmp_path: Path) -> None:
    from openelm.errors import CheckpointError

    bench.train_until(tmp_path, 8)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(CheckpointError, match="ledger"):
        bench.train(tmp_path)


def test_checkpoints_without_any_ledger_are_refused(bench: Any, tmp_path: Path) -> None:
    from openelm.errors import CheckpointError

    bench.train_until(tmp_path, 8)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(CheckpointError, match="ledger"):
        bench.train(tmp_path)


def test_a_finished_run_whose_newest_checkpoint_is_damaged_trains_the_lost_steps_again(
    bench: Any, undisturbed: Path, tmp_path: Path
) -> None:
    bench.train(tmp_path)
    weights = checkpoint_folder(tmp_path, STEPS) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    bench.train(tmp_path)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)
    assert bench.history(tmp_path) == bench.history(undisturbed)


def test_the_ledger_of_a_run_broken_off_often_verifies_and_ends_with_finish(bench: Any, tmp_path: Path) -> None:
    for stop in (2, 5, 7):
        bench.train_until(tmp_path, stop)
    bench.train(tmp_path)
    events = valid_events(read_ledger(tmp_path / "ledger.jsonl"))
    assert events[-1]["event"] == "finish"
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == checkpoint_steps(tmp_path)
