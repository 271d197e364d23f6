"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from openelm.config import Config

Rate = Annotated[float, Field(gt=0, le=1)]


class ScheduleConfig(Config):
    """How the learning rate moves from its warm-up to its end."""

    shape: Literal["cosine", "warmup-stable-decay"] = "cosine"
    """`cosine`: the published one. `warmup-stable-decay`: constant, then linear decay (arXiv 2404.06395)."""
    peak: Rate = 3e-3
    """Learning rate after warm-up."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end, as a fraction of `peak`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In place of `warmup_steps`: a part of all steps, rounded up."""
    warmup_from: Annotated[float, Field(ge=0, le=1)] = 1e-6
    """Learning rate of the first warm-up step."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Part of all steps that `warmup-stable-decay` spends decaying."""

    @model_validator(mode="after")
    def _warm_up_rises(self) -> Self:
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("give warmup_steps or warmup_fraction, not both")
        if (self.warmup_steps or self.warmup_fraction) and self.warmup_from > self.peak:
            raise ValueError(f"warmup_from {self.warmup_from} is above peak {self.peak}")
        return self


def warmup_steps(schedule: ScheduleConfig, steps: int) -> int:
    """Return the length of the warm-up in a run of `steps`."""
    return schedule.warmup_steps or math.ceil(steps * schedule.warmup_fraction)


def learning_rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Return the learning rate of update `step` (0-based) of `steps`.

    The cosine is the published one (CoreNet's configs): warm-up from `warmup_from`, then half a cosine that
    would reach its end one step after the last.
    """
    peak, final = schedule.peak, schedule.peak * schedule.final_fraction
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return schedule.warmup_from + step * (peak - schedule.warmup_from) / warmup
    if schedule.shape == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = max(1, round(steps * schedule.decay_fraction))
    remaining = (steps - step) / decay_steps
    return final + (peak - final) * min(1.0, remaining)
