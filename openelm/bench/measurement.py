"""One measured number: its repeats, their median, and the ceiling that it is held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

Progress = Callable[[str, int, int], None]
"""Called with a case, the repeats that are done, and how many there will be."""

_SHORTEST_SECONDS = 0.02  # a shorter piece of work is repeated within one measurement


@dataclass(frozen=True)
class Measurement:
    """What the repeats of one case gave.

    Attributes:
        values: one for each repeat, in `unit`; the more the better.
        ceiling: what the machine could do at most, in the same unit; None: this is such a ceiling itself.
        ceiling_from: how the ceiling was found.
        settings: what else the number depends on.
    """

    case: str
    values: tuple[float, ...]
    unit: str
    precision: str | None = None
    ceiling: float | None = None
    ceiling_from: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median."""
        return median(self.values)

    @property
    def ratio(self) -> float | None:
        """The part of the ceiling that is reached."""
        return None if self.ceiling is None else self.value / self.ceiling

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "value": self.value,
            "unit": self.unit,
            "ceiling": self.ceiling,
            "ratio": self.ratio,
            "ceiling_from": self.ceiling_from,
            "repeats": len(self.values),
            "spread": [min(self.values), max(self.values)],
            "precision": self.precision,
            **self.settings,
        }


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes on the device."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def repeats_within(work: Callable[[], object], device: torch.device) -> int:
    """Do `work` once untimed, then once more to say how many times it must run to be timed well."""
    work()
    return max(1, round(_SHORTEST_SECONDS / max(timed(work, device), 1e-6)))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
