"""Two models on the same questions: what differs, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from openelm.errors import DataError
from openelm.evaluate.bootstrap import ratio_interval
from openelm.evaluate.exam import Exam, TaskScore

Verdict = Literal["better", "worse", "cannot tell"]
_RESAMPLES, _AT_ONCE = 2_000, 100


@dataclass(frozen=True)
class Difference:
    """The second model's value less the first one's, paired by question.

    Attributes:
        low, high: 95 % bootstrap interval over questions; None for a single one.
        disagreements: questions that the metric values differently.
    """

    task: str
    n: int
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    disagreements: int

    @property
    def verdict(self) -> Verdict:
        """What the interval says of the second model."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "cannot tell"
        return "better" if self.low > 0 else "worse"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def differences(first: Exam, second: Exam) -> tuple[Difference, ...]:
    """Compare models by task, and over all tasks by the mean of the tasks' differences.

    Raises:
        DataError: they were not asked the same questions.
    """
    found, drawn = [], list[np.ndarray]()
    for one, other in zip(first.tasks, second.tasks, strict=True):
        values = _paired(one, other)
        drawn.append(values[:, 1] - values[:, 0])
        found.append(_difference(one.task, values))
    if len(found) < 2:
        return tuple(found)
    return (*found, _overall(found, drawn))


def _paired(one: TaskScore, other: TaskScore) -> np.ndarray:
    """Pair the questions of a task: (n, 2) values."""
    if [item.sha256 for item in one.items] != [item.sha256 for item in other.items]:
        raise DataError(
            f"{one.task}: the two models were not asked the same questions", fix="evaluate both with the same options"
        )
    return np.array([(a.value, b.value) for a, b in zip(one.items, other.items, strict=True)])


def _difference(task: str, values: np.ndarray) -> Difference:
    of_each = values[:, 1] - values[:, 0]
    low, high = ratio_interval(of_each, np.ones_like(of_each)) or (None, None)
    first, second = (float(mean) for mean in values.mean(axis=0))
    disagreements = int((of_each != 0).sum())
    return Difference(task, len(values), first, second, float(of_each.mean()), low, high, disagreements)


def _overall(found: Sequence[Difference], drawn: Sequence[np.ndarray]) -> Difference:
    """Average over tasks: every task counts the same, so questions are resampled within each."""
    generator = np.random.default_rng(0)
    means = np.zeros(_RESAMPLES)
    for of_each in drawn:
        for start in range(0, _RESAMPLES, _AT_ONCE):
            picked = generator.integers(len(of_each), size=(_AT_ONCE, len(of_each)))
            means[start : start + _AT_ONCE] += of_each[picked].mean(axis=1) / len(drawn)
    low, high = np.quantile(means, [0.025, 0.975])
    first, second = sum(part.first for part in found) / len(found), sum(part.second for part in found) / len(found)
    n, disagreements = sum(part.n for part in found), sum(part.disagreements for part in found)
    return Difference("average", n, first, second, second - first, float(low), float(high), disagreements)
