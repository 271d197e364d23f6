"""Two models on the same questions: the difference, its interval, and what may be said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from openelm.errors import DataError

pytest.importorskip("lm_eval")


def exam(*tasks: Sequence[float], asked: str = "q"):  # type: ignore[no-untyped-def]
    from openelm.evaluate.exam import Exam, Item, TaskScore

    def score(task: str, values: Sequence[float]) -> TaskScore:
        items = [Item(task, f"{asked}{place}", value, 0, (), None, None) for place, value in enumerate(values)]
        return TaskScore(task, "acc", 0, None, tuple(items))

    scores = [score(f"task{number}", values) for number, values in enumerate(tasks)]
    return Exam("suite", "model", "0" * 64, tuple(scores))


def test_the_interval_is_that_of_paired_means() -> None:
    """Against the normal approximation of the mean of differences, which 400 questions come close to."""
    from openelm.evaluate.paired import differences

    generator = np.random.default_rng(1)
    first = generator.integers(0, 2, 400).astype(float)
    second = np.where(generator.random(400) < 0.2, 1.0, first)
    (found,) = differences(exam(first), exam(second))
    each = second - first
    spread = 1.96 * each.std(ddof=1) / 400**0.5
    assert found.difference == pytest.approx(each.mean()) and found.disagreements == (each != 0).sum()
    assert found.low == pytest.approx(each.mean() - spread, abs=0.005)
    assert found.high == pytest.approx(each.mean() + spread, abs=0.005)
    assert (found.first, found.second) == pytest.approx((first.mean(), second.mean()))
    assert found.verdict == "better"
    (turned,) = differences(exam(second), exam(first))
    assert turned.verdict == "worse" and turned.difference == -found.difference


def test_equal_and_nearly_equal_models_cannot_be_told_apart() -> None:
    from openelm.evaluate.paired import differences

    same = [1.0, 0.0, 1.0, 1.0]
    assert differences(exam(same), exam(same))[0].verdict == "cannot tell"
    assert differences(exam(same), exam([1.0, 1.0, 1.0, 0.0]))[0].verdict == "cannot tell"
    assert differences(exam([0.0]), exam([1.0]))[0].verdict == "cannot tell"  # one question shows no spread


def test_tasks_count_the_same_in_the_average() -> None:
    """The spread of a mean of two independent means: half the root of the sum of their variances."""
    from openelm.evaluate.paired import differences

    generator = np.random.default_rng(2)
    large, small = generator.integers(0, 2, 900).astype(float), generator.integers(0, 2, 100).astype(float)
    zeros = (np.zeros(900), np.zeros(100))
    *parts, average = differences(exam(*zeros), exam(large, small))
    assert average.task == "average" and average.n == 1000
    assert average.difference == pytest.approx((large.mean() + small.mean()) / 2)
    assert average.difference == pytest.approx(sum(part.difference for part in parts) / 2)
    spread = 1.96 * (large.var(ddof=1) / 900 + small.var(ddof=1) / 100) ** 0.5 / 2
    assert average.low == pytest.approx(average.difference - spread, abs=0.01)
    assert average.high == pytest.approx(average.difference + spread, abs=0.01)


def test_other_questions_are_refused() -> None:
    from openelm.evaluate.paired import differences

    with pytest.raises(DataError, match="not asked the same"):
        differences(exam([1.0, 0.0]), exam([1.0, 0.0], asked="other"))
