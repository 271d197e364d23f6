"""A number that is not finite in one process only: all of them see it, decide the same, and stay equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.model.parts import own_part
from openelm.train.checkpoint import checkpoint_steps
from openelm.train.ledger import number
from openelm.train.update import Updater

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SETTINGS = ("train.rows=8", "data.lanes=4", "train.shards=4", "train.timeout_seconds=20")
KINDS = {
    "fast": SETTINGS,
    "exact": (*SETTINGS, "train.numerics=exact"),
    "sharded": (*SETTINGS, "train.shard_processes=2"),
}


def poisoned_at(step: int, times: int = 1) -> Callable[[], None]:
    """Poison one weight of the process that calls this for the forward and backward passes of a step, then heal it.

    That is a bit that flips in one machine's memory, or a batch that overflows in one: nobody else has it.
    """

    def install() -> None:
        plain = Updater._accumulate

        def poisoned(self: Updater, *arguments: Any) -> torch.Tensor:
            if not step <= self.state.step + 1 < step + times:
                return plain(self, *arguments)
            weight = own_part(self.model.transformer.layers[1].ffn.proj_1.weight.data)
            before = weight[0, 0].clone()
            weight[0, 0] = math.nan
            try:
                return plain(self, *arguments)
            finally:
                with torch.no_grad():
                    weight[0, 0] = before

        Updater._accumulate = poisoned  # type: ignore[method-assign]

    return install


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_is_not_finite_in_one_process_is_skipped_by_all(
    bench: Any, launch: Any, tmp_path: Path, kind: str
) -> None:
    """Where each process has a copy, their hashes are compared before every checkpoint."""
    launch.run(tmp_path / "run", 2, *KINDS[kind], before={1: poisoned_at(5)})
    (skip,) = bench.events(tmp_path / "run", "skip")
    assert (skip["step"], skip["reason"]) == (5, "nonfinite")
    assert math.isnan(number(skip["loss"])) and math.isnan(number(skip["gradient_norm"]))
    assert [step for step, *_ in bench.history(tmp_path / "run")] == list(range(1, 13))
    assert all(math.isfinite(number(row[4])) for row in bench.history(tmp_path / "run") if row[0] != 5)
    assert checkpoint_steps(tmp_path / "run") == [3, 6, 9, 12]


def test_it_does_not_matter_in_which_process_or_if_in_all(bench: Any, launch: Any, tmp_path: Path) -> None:
    for name, ranks in (("first", [0]), ("second", [1]), ("both", [0, 1])):
        launch.run(tmp_path / name, 2, *KINDS["exact"], before=dict.fromkeys(ranks, poisoned_at(5)))
    for name in ("second", "both"):
        assert bench.fingerprint(tmp_path / name) == bench.fingerprint(tmp_path / "first")


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_stop_ends_every_process_with_exit_6(bench: Any, launch: Any, tmp_path: Path, kind: str) -> None:
    settings = (*KINDS[kind], "train.on_nonfinite=stop")
    processes = launch.start(tmp_path / "run", 2, *settings, before={1: poisoned_at(5)})
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 6, errors
        assert "E_NUMERIC" in errors and "step 5" in errors and "Traceback" not in errors
    assert [event["step"] for event in bench.events(tmp_path / "run", "nonfinite")] == [5]
    assert checkpoint_steps(tmp_path / "run") == [3]


def test_too_many_skips_in_a_row_end_every_process_with_exit_6(bench: Any, launch: Any, tmp_path: Path) -> None:
    settings = (*SETTINGS, "train.max_skips=2")
    processes = launch.start(tmp_path / "run", 2, *settings, before={0: poisoned_at(5, times=9)})
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 6, errors
    assert [event["step"] for event in bench.events(tmp_path / "run", "skip")] == [5, 6]
