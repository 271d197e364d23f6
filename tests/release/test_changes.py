"""What a report says changed is what the paired comparison of two models says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from openelm.evaluate.exam import Exam, Item, TaskScore
from openelm.evaluate.paired import differences
from openelm.release.changes import changes
from openelm.release.record import ExamplesLine, HeldOutLine, Record, SuiteLine, SuiteTask

HASH = "0" * 64


def answers(seed: int, right: float) -> list[int]:
    draw = random.Random(seed)
    return [int(draw.random() < right) for _ in range(200)]


def line(step: int, values: list[int], questions: str = HASH) -> SuiteLine:
    task = SuiteTask(
        task="t",
        metric="acc",
        n=len(values),
        value=(sum(values) / len(values)).hex(),
        values="".join(map(str, values)),
        questions_sha256=questions,
    )
    return SuiteLine(step=step, suite="s", tasks=(task,))


def exam(values: list[int]) -> Exam:
    items = tuple(Item("t", str(place), float(value), None, (), None, None) for place, value in enumerate(values))
    return Exam("s", "m", HASH, (TaskScore("t", "acc", 0, None, items),))


@pytest.mark.parametrize(("before", "after"), [(0.3, 0.6), (0.6, 0.3), (0.5, 0.5)])
def test_a_suites_difference_and_verdict_are_those_of_openelm_compare(before: float, after: float) -> None:
    first, last = answers(0, before), answers(1, after)
    record = Record(Path("run"), suites=[line(0, first), line(5, answers(2, 0.9)), line(9, last)])
    (found,) = changes(record)
    (wanted,) = differences(exam(first), exam(last))
    assert found.difference == pytest.approx(100 * wanted.difference)
    assert wanted.low is not None and wanted.high is not None
    assert (found.low, found.high) == pytest.approx((100 * wanted.low, 100 * wanted.high))
    assert found.verdict == wanted.verdict


def test_other_questions_have_no_interval() -> None:
    record = Record(Path("run"), suites=[line(0, answers(0, 0.3)), line(9, answers(1, 0.9), "1" * 64)])
    (found,) = changes(record)
    assert found.low is None and found.verdict == ""


def test_without_a_measurement_before_training_nothing_changed() -> None:
    record = Record(
        Path("run"),
        suites=[line(3, answers(0, 0.3)), line(9, answers(1, 0.9))],
        held_out=[HeldOutLine(step=3, bits_per_byte=2.0), HeldOutLine(step=9, bits_per_byte=1.0)],
        examples=[ExamplesLine(step=3, examples=5, loss=2.0), ExamplesLine(step=9, examples=5, loss=1.0)],
    )
    assert changes(record) == []
