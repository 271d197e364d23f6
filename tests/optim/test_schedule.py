"""The learning rate of every step against formulas written here from the published recipe."""

from __future__ import annotations

import math
from typing import Any

import pytest

from openelm.errors import ConfigError
from openelm.optim.schedule import ScheduleConfig, learning_rate


def published(step: int, peak: float, updates: int, warmup: int) -> float:
    """Warm-up from 1e-6, then half a cosine to a tenth; `updates` - `warmup` is 345,001 in the published runs."""
    if step < warmup:
        return 1e-6 + step * (peak - 1e-6) / warmup
    low = 0.1 * peak
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * (step - warmup) / (updates - warmup)))


@pytest.mark.parametrize("peak", [5.3e-3, 3.9e-3, 2.4e-3, 1.2e-3])
def test_the_published_schedule_at_full_length(peak: float) -> None:
    schedule = ScheduleConfig(peak=peak, warmup_steps=5000)
    for step in (0, 1, 2500, 4999, 5000, 5001, 100_000, 349_999, 350_000):
        found = learning_rate(schedule, step, 350_001)
        assert found == pytest.approx(published(step, peak, 350_001, 5000), rel=1e-12)
        if step >= 5000:
            cosine = 1 + math.cos(math.pi * (step - 5000) / 345_001)
            assert found == pytest.approx(0.1 * peak + 0.5 * 0.9 * peak * cosine, rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("steps", [1, 8, 41])
def test_every_step_of_a_small_cosine(steps: int, warmup: int) -> None:
    schedule = ScheduleConfig(peak=0.01, warmup_steps=warmup)
    for step in range(steps):
        assert learning_rate(schedule, step, steps) == pytest.approx(published(step, 0.01, steps, warmup), rel=1e-12)


def test_the_cosine_reaches_its_end_one_step_after_the_last() -> None:
    schedule = ScheduleConfig(peak=0.01, warmup_steps=5)
    assert learning_rate(schedule, 50, 50) == pytest.approx(0.001, rel=1e-12)
    assert learning_rate(schedule, 49, 50) > 0.001


@pytest.mark.parametrize("shape", ["cosine", "warmup-stable-decay"])
def test_the_peak_is_reached_exactly_when_warm_up_ends(shape: str) -> None:
    schedule = ScheduleConfig.parse({"shape": shape, "peak": 0.01, "warmup_steps": 5})
    rates = [learning_rate(schedule, step, 50) for step in range(50)]
    assert rates[0] == 1e-6
    assert rates[5] == max(rates) == pytest.approx(0.01, rel=1e-15)
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert min(rates[5:]) >= 0.001


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_stable_shape_is_flat_and_then_a_line(final: float) -> None:
    schedule = ScheduleConfig.parse(
        {
            "shape": "warmup-stable-decay",
            "peak": 1.0,
            "final_fraction": final,
            "warmup_steps": 3,
            "decay_fraction": 0.25,
        }
    )
    rates = [learning_rate(schedule, step, 40) for step in range(41)]
    assert rates[3:31] == [1.0] * 28
    for index, rate in enumerate(rates[30:]):
        assert rate == pytest.approx(1.0 - (1.0 - final) * index / 10, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("shape", ["cosine", "warmup-stable-decay"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_rates(shape: str, steps: int) -> None:
    schedule = ScheduleConfig.parse({"shape": shape, "peak": 0.01})
    assert learning_rate(schedule, 0, steps) == pytest.approx(0.01, rel=1e-12)
    assert learning_rate(schedule, steps, steps) == pytest.approx(0.001, rel=1e-12)
    assert all(0.001 < learning_rate(schedule, step, steps) < 0.0101 for step in range(steps))


def test_without_decay_the_rate_stays() -> None:
    schedule = ScheduleConfig(peak=0.01, final_fraction=1.0)
    assert {learning_rate(schedule, step, 20) for step in range(21)} == {0.01}


@pytest.mark.parametrize(
    "values",
    [
        {"peak": 0},
        {"peak": -1e-3},
        {"peak": 1.5},
        {"peak": float("nan")},
        {"final_fraction": 1.1},
        {"warmup_steps": -1},
        {"decay_fraction": 0},
        {"shape": "linear"},
        {"peak": 1e-7, "warmup_steps": 5},
    ],
    ids=str,
)
def test_impossible_schedules_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        ScheduleConfig.parse(values)
