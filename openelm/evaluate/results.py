"""Read what `openelm eval MODEL --suite NAME --json` printed, and trust none of it."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openelm.errors import DataError
from openelm.evaluate.presets import PRESETS, Suite

_FIX = "write it again: openelm eval MODEL --suite NAME --json > FILE"
_ROUNDING = 1e-4  # how far a stated average may be from the mean of its tasks


@dataclass(frozen=True)
class TaskResult:
    """A measured task; value, low and high are fractions, low and high the ends of its interval or both None."""

    task: str
    shots: int
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    note: str | None


@dataclass(frozen=True)
class SuiteResult:
    """A model measured on a suite, or a part of it; `average` is the mean of `tasks`, None where it is not stated."""

    suite: str
    model: str
    average: float | None
    tasks: tuple[TaskResult, ...]
    file: str


def read_result(path: Path) -> SuiteResult:
    """Read one results file; keys that the table does not need may be there too.

    Raises:
        DataError: the file is missing, is not JSON (E_JSON) or is not a result of a suite (E_SCHEMA).
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError("no such file", fix=_FIX, file=path, code="E_PATH") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", fix=_FIX, file=path, code="E_READ") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {str(error)[:120]}", fix=_FIX, file=path, code="E_JSON") from None
    try:
        return _result(found, path.name)
    except _Wrong as wrong:
        raise DataError(str(wrong), fix=wrong.fix, file=path, code="E_SCHEMA") from None


class _Wrong(Exception):
    """What is wrong with a file that is valid JSON."""

    def __init__(self, what: str, fix: str = _FIX) -> None:
        super().__init__(what)
        self.fix = fix


def _result(found: object, name: str) -> SuiteResult:
    if not isinstance(found, dict):
        raise _Wrong(f"an object is expected, not {_shown(found)}")
    suite = PRESETS.get(_text(found, "suite", "result"))
    if suite is None:
        raise _Wrong(f"no suite of the paper is called {_shown(found['suite'])}", f"suites: {', '.join(PRESETS)}")
    listed = found.get("tasks")
    if not isinstance(listed, list) or not listed:
        raise _Wrong(f"'tasks' is {_shown(listed)}, and a list of at least one task is expected")
    tasks = tuple(_task(item, suite, place) for place, item in enumerate(listed, start=1))
    names = [task.task for task in tasks]
    twice = next((task for task in names if names.count(task) > 1), None)
    if twice is not None:
        raise _Wrong(f"task {twice} is there twice", "keep one of them")
    average, mean = _fraction(found, "average", "result"), math.fsum(task.value for task in tasks) / len(tasks)
    if average is not None and abs(average - mean) > _ROUNDING:
        raise _Wrong(f"'average' is {average:.4f}, and the unweighted mean of the {len(tasks)} tasks is {mean:.4f}")
    return SuiteResult(suite.name, _text(found, "model", "result"), average, tasks, name)


def _task(item: object, suite: Suite, place: int) -> TaskResult:
    where = f"task {place}"
    if not isinstance(item, dict):
        raise _Wrong(f"{where} is {_shown(item)}, and an object is expected")
    task = _text(item, "task", where)
    allowed = [spec.task for spec in suite.tasks]
    if task not in allowed:
        raise _Wrong(f"{_shown(task)} is no task of {suite.name}", f"its tasks: {', '.join(allowed)}")
    value, low, high = (_fraction(item, key, task) for key in ("value", "low", "high"))
    if value is None:
        raise _Wrong(f"'value' of {task} is missing", "leave out tasks that were not measured")
    if (low is None) != (high is None) or (low is not None and high is not None and low > high):
        raise _Wrong(f"'low' and 'high' of {task} are {low} and {high}, and an interval or two nulls are expected")
    shots, note = _count(item, "shots", task), item.get("note")
    if shots is None:
        raise _Wrong(f"'shots' of {task} is missing")
    if note is not None and not isinstance(note, str):
        raise _Wrong(f"'note' of {task} is {_shown(note)}, and text or null is expected")
    metric = _text(item, "metric", task)
    return TaskResult(task, shots, metric, value, low, high, _count(item, "n", task), note or None)


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _Wrong(f"{key!r} of {where} is {_shown(value)}, and text is expected")
    return value


def _fraction(values: Mapping[str, Any], key: str, where: str) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:  # nan is not
        what = f"{key!r} of {where} is {_shown(value)}, and a fraction from 0 to 1 is expected"
        raise _Wrong(what, "divide percent by 100")
    return float(value)


def _count(values: Mapping[str, Any], key: str, where: str) -> int | None:
    value = values.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise _Wrong(f"{key!r} of {where} is {_shown(value)}, and a whole number from 0 is expected")
    return value


def _shown(value: object) -> str:
    return "missing" if value is None else reprlib.repr(value)
