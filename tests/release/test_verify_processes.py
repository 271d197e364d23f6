"""Runs that several processes made are verified like those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openelm.train.saving import Saver

from ..train.forks import Launch
from .conftest import Workshop, read_lines


class Recipes:
    """Gives the workshop's recipe to the launcher."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

    def values(self, *overrides: str) -> dict[str, Any]:
        return self._workshop.config(*overrides).model_dump(mode="json")


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        (("train.numerics=exact", "train.shards=2"), "verified"),
        ((), "consistent (weaker: other numerics)"),
        (("train.shard_processes=2", "checkpoints.background=true"), "consistent (weaker: other numerics)"),
    ],
    ids=["exact", "fast", "sharded, saved in the background"],
)
def test_a_run_of_two_processes_is_verified_by_one(
    workshop: Workshop, tmp_path: Path, settings: tuple[str, ...], verdict: str
) -> None:
    run = tmp_path / "run"
    Launch(Recipes(workshop)).run(run, 2, *settings)
    workshop.publish(run)
    assert read_lines(run)[0]["processes"] == 2
    findings = workshop.verify(run, 4)
    assert findings.verdict == verdict, findings.difference


def test_a_checkpoint_that_is_recorded_just_before_the_next_is_saved_is_no_fault(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its line stands between the lines of the next one's step and that one's own."""
    save, take, begun = Saver.save, Saver.take, []

    def save_noting(saver: Saver, *state: Any) -> None:
        save(saver, *state)
        begun.append(None)

    def take_one_step_later(saver: Saver, *, wait: bool) -> dict[str, Any] | None:
        return begun.pop() if begun and not wait else take(saver, wait=True)

    monkeypatch.setattr(Saver, "save", save_noting)
    monkeypatch.setattr(Saver, "take", take_one_step_later)
    workshop.train(tmp_path, "checkpoints.background=true", "checkpoints.every=1", "checkpoints.keep_last=20")
    events = read_lines(tmp_path)
    (place,) = (at for at, event in enumerate(events) if (event["event"], event["step"]) == ("checkpoint", 3))
    assert [(event["event"], event["step"]) for event in events[place - 1 : place + 2]] == [
        ("step", 4),
        ("checkpoint", 3),
        ("step", 5),
    ]
    assert workshop.verify(tmp_path, 3).verdict == "verified"
