"""Saving in the background, and the checks that stand in front of a save."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.errors import DiskError, VerificationError
from openelm.train import saving
from openelm.train.checkpoint import checkpoint_steps, write_part
from openelm.train.distributed import ALONE
from openelm.train.objectives import NextToken
from openelm.train.saving import Saver
from openelm.train.update import Updater

BACKGROUND = "checkpoints.background=true"


def test_a_run_that_saves_in_the_background_gives_the_same_bits(bench: Any, undisturbed: Path, tmp_path: Path) -> None:
    bench.train(tmp_path, BACKGROUND)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)
    assert bench.history(tmp_path) == bench.history(undisturbed)
    found, expected = (
        {event["step"]: event["weights_sha256"] for event in bench.events(folder, "checkpoint")}
        for folder in (tmp_path, undisturbed)
    )
    assert found == expected


def test_a_run_broken_off_while_it_saves_in_the_background_ends_the_same(
    bench: Any, undisturbed: Path, tmp_path: Path
) -> None:
    bench.train_until(tmp_path, 7, BACKGROUND)
    bench.train(tmp_path, BACKGROUND)
    assert bench.fingerprint(tmp_path) == bench.fingerprint(undisturbed)
    assert bench.history(tmp_path) == bench.history(undisturbed)


def test_the_copy_is_complete_before_the_next_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save is held back until the weights have changed; what it writes is what they were."""
    held, written = threading.Event(), []

    def slow(folder: Path, part: int, count: int, weights: dict[str, torch.Tensor], *rest: Any) -> None:
        held.wait(20)
        written.append(weights["w"].clone())
        write_part(folder, part, count, weights, *rest)

    monkeypatch.setattr(saving, "write_part", slow)
    weight = torch.ones(3)
    with Saver(tmp_path, ALONE, background=True) as saver:
        saver.save(1, {"w": weight}, {}, {})
        assert saver.take(wait=False) is None
        weight.zero_()
        held.set()
        assert saver.take(wait=True)["step"] == 1  # type: ignore[index]
    assert written[0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("stage", ["write_part", "write_state"])
def test_a_save_that_fails_in_the_background_stops_the_run_and_leaves_nothing(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def full(*arguments: Any) -> None:
        raise DiskError("cannot write: no space left")

    monkeypatch.setattr(saving, stage, full)
    with pytest.raises(DiskError):
        bench.train(tmp_path, BACKGROUND)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert max(event["step"] for event in bench.events(tmp_path, "step")) <= 6


def test_a_machine_that_computes_the_same_twice_passes_the_recheck(
    bench: Any, undisturbed: Path, tmp_path: Path
) -> None:
    bench.train(tmp_path, "train.recheck_every=2")
    assert bench.history(tmp_path) == bench.history(undisturbed)


@pytest.mark.parametrize("bit", [0, 12, 30])
def test_a_bit_that_flips_in_a_gradient_is_caught_when_it_is_rechecked(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bit: int
) -> None:
    plain, calls = Updater._add_rows, 0

    def flipping(self: Updater, *arguments: Any) -> None:
        nonlocal calls
        plain(self, *arguments)
        calls += 1
        if calls == 4:  # the first of the two computations of step 4
            self.gradients.values.view(torch.int32)[100] ^= 1 << bit  # type: ignore[union-attr]

    monkeypatch.setattr(Updater, "_add_rows", flipping)
    with pytest.raises(VerificationError, match="step 4"):
        bench.train(tmp_path, "train.recheck_every=4")


def test_processes_whose_weights_differ_are_found_before_a_save(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from openelm.train.distributed import Processes
    from openelm.train.loop import _Trainer

    run = bench.open(tmp_path)
    trainer = _Trainer.__new__(_Trainer)
    trainer.updater = Updater(run, NextToken())
    trainer.state = trainer.updater.state

    class TwoThatDiffer(Processes):
        def gather_json(self, value: Any) -> list[Any]:
            return [value, value[::-1]]

    trainer.processes = TwoThatDiffer(0, 2)
    with pytest.raises(VerificationError, match="process 1 differ"):
        trainer._compare(trainer.updater.model.state_dict())


def test_a_save_may_take_longer_than_the_processes_wait_for_each_other(
    bench: Any, launch: Any, undisturbed: Path, tmp_path: Path
) -> None:
    def read_slowly() -> None:
        load = saving.load_checkpoint

        def slow(run: Path, step: int) -> Any:
            time.sleep(4)
            return load(run, step)

        saving.load_checkpoint = slow

    settings = ("train.timeout_seconds=2", "train.steps=3", "data.lanes=4")
    launch.run(tmp_path / "run", 2, *settings, before={0: read_slowly})
    assert checkpoint_steps(tmp_path / "run") == [3]


def test_a_save_that_is_under_way_when_training_fails_is_not_lost(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = saving.load_checkpoint

    def slow(run: Path, step: int) -> Any:
        time.sleep(0.5)
        return load(run, step)

    monkeypatch.setattr(saving, "load_checkpoint", slow)
    bench.train_until(tmp_path, 4, "checkpoints.background=true")
    assert checkpoint_steps(tmp_path) == [3]
