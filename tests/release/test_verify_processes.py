"""Runs that several processes made are verified like those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
