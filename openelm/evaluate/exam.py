"""A model's results in tasks of lm-evaluation-harness: by question, so that two models can be compared on each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.model import LM

from openelm.errors import ConfigError, NumericError
from openelm.evaluate.bootstrap import ratio_interval
from openelm.evaluate.tasks import LoadedTask, quiet
from openelm.files.hashes import canonical_json, sha256_bytes

_SEED = 1234
"""Draws the examples before a question: the harness's own."""


@dataclass(frozen=True)
class Item:
    """A question and how it was answered.

    Attributes:
        sha256: of the question, the prompts and the right answer: equal for models that were asked the same.
        value: what the metric gives it, 0 or 1 for accuracies.
        choice: index of the likeliest answer, None where the model writes.
        nats: log-likelihood of each answer.
        right_nats, right_bytes: of the right answer, where there is one.
    """

    task: str
    sha256: str
    value: float
    choice: int | None
    nats: tuple[float, ...]
    right_nats: float | None
    right_bytes: int | None


@dataclass(frozen=True)
class TaskScore:
    """A task's result; `low` and `high` are the ends of a 95 % bootstrap interval over questions."""

    task: str
    metric: str
    shots: int
    note: str | None
    items: tuple[Item, ...]

    @property
    def n(self) -> int:
        return len(self.items)

    @property
    def value(self) -> float:
        return math.fsum(item.value for item in self.items) / self.n

    @property
    def standard_error(self) -> float | None:
        """The sample's, as the harness gives it; None for a single question."""
        return float(np.std([item.value for item in self.items], ddof=1) / self.n**0.5) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        values = np.array([item.value for item in self.items])
        return ratio_interval(values, np.ones_like(values))

    @property
    def bits_per_byte(self) -> float | None:
        """Of the right answers; None in tasks without one."""
        known = [(item.right_nats, item.right_bytes) for item in self.items if item.right_bytes]
        if len(known) < self.n:
            return None
        return -math.fsum(nats or 0.0 for nats, _ in known) / math.log(2) / sum(count or 0 for _, count in known)

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        return {
            "task": self.task,
            "metric": self.metric,
            "shots": self.shots,
            "value": self.value,
            "low": low,
            "high": high,
            "standard_error": self.standard_error,
            "n": self.n,
            "bits_per_byte": self.bits_per_byte,
            "questions_sha256": sha256_bytes(canonical_json([item.sha256 for item in self.items])),
            "note": self.note,
        }


@dataclass(frozen=True)
class Exam:
    """A model's results in a suite; `average` is the unweighted mean of its tasks."""

    suite: str
    model: str
    model_sha256: str
    tasks: tuple[TaskScore, ...]

    @property
    def average(self) -> float:
        return math.fsum(task.value for task in self.tasks) / len(self.tasks)

    def to_json(self) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "average": self.average,
            "tasks": [task.to_json() for task in self.tasks],
        }


def examine(examinee: LM, tasks: Sequence[LoadedTask], *, limit: int | None = None) -> tuple[TaskScore, ...]:
    """Let a model answer tasks; a task's prompts and metrics are the harness's.

    Args:
        examinee: an `Examinee`, or any other model of the harness.
        limit: questions of each task, from its beginning.

    Raises:
        ConfigError: a task does not have its metric, or lets the model write where it cannot.
        NumericError: a log-likelihood is not finite.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}", fix="use 1 or more questions")
    parts = {name: task for loaded in tasks for name, task in loaded.parts.items()}
    for task in parts.values():
        task.set_fewshot_seed(seed=_SEED)  # each time, so that two models see the same examples
    with quiet():
        found = evaluator.evaluate(
            lm=examinee,
            task_dict={"tasks": parts, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    assert found is not None
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    return tuple(_scored(loaded, samples, limit) for loaded in tasks)


def _scored(loaded: LoadedTask, samples: dict[str, list[dict[str, Any]]], limit: int | None) -> TaskScore:
    spec = loaded.spec
    items, filters = list[Item](), set[str]()
    for name, task in loaded.parts.items():
        first = samples[name][0]["filter"]  # of several ways to read an answer out of what was written
        ours = [sample for sample in samples[name] if sample["filter"] == first]
        if first != "none":
            filters.add(first)
        for sample in sorted(ours, key=lambda sample: int(sample["doc_id"])):
            if spec.metric not in sample:
                has = ", ".join(sample["metrics"])
                raise ConfigError(f"{name} has no metric {spec.metric}", fix=f"it has {has}")
            right = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
            items.append(_item(name, sample, right, spec.metric))
    read_by = f"read by {', '.join(sorted(filters))}" if filters else None
    notes = [note for note in (loaded.note, read_by, limit and f"the first {limit} questions") if note]
    return TaskScore(spec.task, spec.metric, spec.shots, "; ".join(notes) or None, tuple(items))


def _item(task: str, sample: dict[str, Any], right: Any, metric: str) -> Item:
    asked = canonical_json([task, sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]])
    choice, nats, right_nats, right_bytes = None, tuple[float, ...](), None, None
    answers = sample["filtered_resps"]
    if answers and isinstance(answers[0], tuple | list) and len(answers[0]) == 2:
        nats = tuple(float(answer[0]) for answer in answers)
        choice = max(range(len(nats)), key=nats.__getitem__)
        if isinstance(right, int) and 0 <= right < len(nats):
            right_nats, right_bytes = nats[right], len(sample["arguments"][right][1].encode())
    if not isinstance(sample[metric], bool | int | float | np.number):
        raise ConfigError(f"{metric} of {task} is no number", fix="use lm-evaluation-harness itself")
    value = float(sample[metric])
    if not math.isfinite(value):
        raise NumericError(f"{task}: {metric} is {value}", fix="look at the task's questions")
    return Item(task, sha256_bytes(asked), value, choice, nats, right_nats, right_bytes)


def items_jsonl(tasks: Sequence[TaskScore]) -> bytes:
    """Write the items of tasks, one JSON object a line."""
    return b"".join(json.dumps(vars(item)).encode() + b"\n" for task in tasks for item in task.items)
