"""What a run changed: its first measurement of each kind beside its last one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from openelm.evaluate.bootstrap import ratio_interval
from openelm.release.record import Record, SuiteTask

HELD_OUT_TEXT = "held-out text"


@dataclass(frozen=True)
class Change:
    """One quantity before and after.

    Attributes:
        unit: "bits per byte", "nats" or "%".
        low, high: 95 % bootstrap interval of the difference over questions that were asked both times, if known.
        n: what was asked or scored.
        more_is_better: which way is up.
    """

    name: str
    unit: str
    before: float
    after: float
    n: int | None = None
    low: float | None = None
    high: float | None = None
    more_is_better: bool = False

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """What the interval says; nothing where there is none."""
        if self.low is None or self.high is None:
            return ""
        if self.low <= 0 <= self.high:
            return "cannot tell"
        return "better" if (self.low > 0) == self.more_is_better else "worse"


def changes(record: Record) -> list[Change]:
    """List what was measured at least twice, the first time before training began."""
    return [*_text(record), *_examples(record), *_suites(record)]


def _text(record: Record) -> Iterator[Change]:
    lines = record.held_out
    if len(lines) > 1 and lines[0].step == 0:
        yield Change(
            HELD_OUT_TEXT, "bits per byte", lines[0].bits_per_byte, lines[-1].bits_per_byte, lines[-1].documents
        )


def _examples(record: Record) -> Iterator[Change]:
    lines = record.examples
    if len(lines) < 2 or lines[0].step:
        return
    first, last = lines[0], lines[-1]
    what = "pair" if last.preference_accuracy is not None else "learned token"
    yield Change(f"held-out examples, loss a {what}", "nats", first.loss, last.loss, last.examples)
    if first.preference_accuracy is not None and last.preference_accuracy is not None:
        yield Change(
            "held-out pairs, chosen answer preferred more than by the base",
            "%",
            100 * first.preference_accuracy,
            100 * last.preference_accuracy,
            last.examples,
            more_is_better=True,
        )


def _suites(record: Record) -> Iterator[Change]:
    names = dict.fromkeys(line.suite for line in record.suites)
    for name in names:
        lines = [line for line in record.suites if line.suite == name]
        if len(lines) < 2 or lines[0].step:
            continue
        for before, after in zip(lines[0].tasks, lines[-1].tasks, strict=False):
            low, high = _interval(before, after) or (None, None)
            yield Change(
                f"{after.task} ({after.metric})", "%", 100 * before.value, 100 * after.value, after.n, low, high, True
            )


def _interval(before: SuiteTask, after: SuiteTask) -> tuple[float, float] | None:
    """Resample the questions; both times each was worth 0 or 1."""
    if not before.values or not after.values or before.questions_sha256 != after.questions_sha256:
        return None
    worth = [np.array([float(value) for value in task.values or ""]) for task in (before, after)]
    if len(worth[0]) != len(worth[1]):
        return None
    difference = 100 * (worth[1] - worth[0])
    return ratio_interval(difference, np.ones_like(difference))
