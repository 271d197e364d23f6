"""Losses that are not finite, and spikes: skipped or stopped by policy, recorded, and the same after a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from openelm.errors import NumericError
from openelm.model.folder import weights_sha256
from openelm.train.ledger import number
from openelm.train.objectives import NextToken


class Bad(NextToken):
    """The usual objective, but with another loss at chosen steps; counts from the step it is first asked for."""

    def __init__(self, at: dict[int, float], first: int = 1) -> None:
        super().__init__()
        self.__dict__.update(_at=at, _step=first)

    def __call__(self, model: Any, rows: Any) -> Any:
        loss, nll = super().__call__(model, rows)
        factor = self._at.get(self._step, 1.0)
        self.__dict__["_step"] += 1
        return loss * factor, nll * factor


class Weights:
    """A probe that remembers the weights after each step."""

    every, at_start = 1, False

    def __init__(self) -> None:
        self.after: dict[int, str] = {}

    def measure(self, model: Any, step: int) -> dict[str, Any]:
        self.after[step] = weights_sha256(model.state_dict())
        return {"event": "evaluation", "bits_per_byte": (1.0).hex(), "documents": 0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_skipped_recorded_and_changes_no_weight(
    bench: Any, tmp_path: Path, value: float
) -> None:
    weights = Weights()
    bench.train(tmp_path, objective=Bad({5: value}), probes=(weights,))
    (skip,) = bench.events(tmp_path, "skip")
    assert (skip["step"], skip["reason"]) == (5, "nonfinite")
    (step,) = [event for event in bench.events(tmp_path, "step") if event["step"] == 5]
    assert skip["batch_sha256"] == step["batch_sha256"]
    assert not math.isfinite(number(skip["loss"]))
    assert weights.after[5] == weights.after[4]
    assert len(set(weights.after.values())) == 11
    assert [step for step, *_ in bench.history(tmp_path)] == list(range(1, 13))


class FiniteLossBadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Any) -> Any:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient * math.nan


def test_a_finite_loss_with_a_gradient_that_is_not_finite_is_skipped_too(bench: Any, tmp_path: Path) -> None:
    weights, calls = Weights(), iter(range(1, 99))

    class Objective(NextToken):
        def __call__(self, model: Any, rows: Any) -> Any:
            loss, nll = super().__call__(model, rows)
            return (FiniteLossBadGradient.apply(loss) if next(calls) == 5 else loss), nll

    bench.train(tmp_path, objective=Objective(), probes=(weights,))
    (skip,) = bench.events(tmp_path, "skip")
    assert math.isfinite(number(skip["loss"])) and math.isnan(number(skip["gradient_norm"]))
    assert weights.after[5] == weights.after[4]


def test_the_policy_stop_ends_the_run_with_exit_6_and_keeps_the_checkpoints(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="step 8") as caught:
        bench.train(tmp_path, "train.on_nonfinite=stop", objective=Bad({8: math.nan}))
    assert caught.value.exit_code == 6
    assert "ledger.jsonl" in str(caught.value)
    assert [event["step"] for event in bench.events(tmp_path, "nonfinite")] == [8]
    assert bench.fingerprint(tmp_path, 6)


def test_too_many_skips_in_a_row_stop_the_run(bench: Any, tmp_path: Path) -> None:
    bad = dict.fromkeys((4, 5, 7, 8, 9), math.nan)
    with pytest.raises(NumericError, match="step 9"):
        bench.train(tmp_path, "train.max_skips=3", objective=Bad(bad))
    assert [event["step"] for event in bench.events(tmp_path, "skip")] == [4, 5, 7, 8, 9]


def test_skips_in_a_row_are_counted_over_a_resume(bench: Any, tmp_path: Path) -> None:
    bad = dict.fromkeys((5, 6, 7), math.nan)
    settings = ("train.max_skips=3", "checkpoints.every=6")
    bench.train_until(tmp_path, 6, *settings, kind="checkpoint", objective=Bad(bad))
    with pytest.raises(NumericError, match="step 7"):
        bench.train(tmp_path, *settings, objective=Bad(bad, first=7))


@pytest.mark.parametrize("stop", [4, 5, 6, 8])
def test_a_resume_around_a_skipped_update_ends_with_the_same_bits(bench: Any, tmp_path: Path, stop: int) -> None:
    bench.train(tmp_path / "whole", objective=Bad({5: math.nan}))
    bench.train_until(tmp_path / "broken", stop, objective=Bad({5: math.nan}))
    first = 3 * (stop // 3) + 1 if stop % 3 else stop - 2
    bench.train(tmp_path / "broken", objective=Bad({5: math.nan}, first=first))
    assert bench.fingerprint(tmp_path / "broken") == bench.fingerprint(tmp_path / "whole")
    assert bench.history(tmp_path / "broken") == bench.history(tmp_path / "whole")


@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_a_spike_is_kept_or_skipped_by_policy(bench: Any, tmp_path: Path, policy: str) -> None:
    weights = Weights()
    settings = ("train.steps=40", f"train.on_spike={policy}")
    bench.train(tmp_path, *settings, objective=Bad({36: 50.0}), probes=(weights,))
    (event,) = bench.events(tmp_path, "skip" if policy == "skip" else "spike")
    assert (event["step"], event["reason"]) == (36, "spike")
    assert (weights.after[36] == weights.after[35]) is (policy == "skip")


def test_no_spike_is_seen_before_there_are_enough_losses(bench: Any, tmp_path: Path) -> None:
    bench.train(tmp_path, objective=Bad({6: 50.0}))
    assert not bench.events(tmp_path, "spike") + bench.events(tmp_path, "skip")


def test_the_same_spike_is_seen_after_a_resume(bench: Any, tmp_path: Path) -> None:
    """The losses a spike is measured against are part of the checkpoint."""
    settings = ("train.steps=40", "train.on_spike=skip")
    bench.train(tmp_path / "whole", *settings, objective=Bad({36: 50.0}))
    bench.train_until(tmp_path / "broken", 35, *settings, objective=Bad({36: 50.0}))
    bench.train(tmp_path / "broken", *settings, objective=Bad({36: 50.0}, first=34))
    assert bench.fingerprint(tmp_path / "broken", 40) == bench.fingerprint(tmp_path / "whole", 40)
    assert len(bench.events(tmp_path / "broken", "skip")) == 1
