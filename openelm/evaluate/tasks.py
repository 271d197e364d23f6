"""Tasks of lm-evaluation-harness by name, on data from the hub or from this machine."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lm_eval
from datasets import Dataset
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from openelm.errors import ConfigError, DataError
from openelm.evaluate.local_data import LocalData, find_local_data
from openelm.evaluate.presets import TaskSpec

DataFrom = Literal["auto", "hub", "local"]
_FOLDERS = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "boolq": "super_glue/boolq",
    "commonsense_qa": "commonsense_qa",
    "crows_pairs_english": "crows_pairs",
    "hellaswag": "hellaswag",
    "mmlu": "mmlu/default",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "race": "race",
    "sciq": "sciq",
    "social_iqa": "siqa",
    "truthfulqa_mc2": "truthfulqa",
    "winogrande": "winogrande",
}
"""Where the harness keeps the tasks of our suites: to read all of its folders takes many seconds."""
_HUB = "huggingface.co"


@dataclass(frozen=True)
class Wanted:
    """A task or a group by name; None takes the task's own shots, and the first metric of which the mean counts."""

    task: str
    shots: int | None
    metric: str | None


class LoadedTask:
    """A column of a suite: a task of the harness, or several whose items count together.

    Attributes:
        note: how its data differ from those the task has by itself, or None.
    """

    def __init__(self, spec: TaskSpec, parts: dict[str, Task], note: str | None) -> None:
        self.spec, self.parts, self.note = spec, parts, note


def load_tasks(wanted: Sequence[Wanted], data: DataFrom = "auto", *, hub: str = _HUB) -> list[LoadedTask]:
    """Load tasks and their data.

    Args:
        data: where from; "auto" takes the hub where it can be reached.

    Raises:
        ConfigError: no such task, or there are no data for it.
        DataError: its data cannot be loaded.
    """
    if data not in get_args(DataFrom):
        raise ConfigError(f"data from {data!r}", fix=f"use one of {', '.join(get_args(DataFrom))}")
    local = data == "local" or (data == "auto" and not _reaches(hub))
    manager = _manager([one.task for one in wanted])
    shots = [_shots_of_parts(manager, one) for one in wanted]
    names = [name for parts in shots for name in parts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{', '.join(sorted(twice))} would be asked twice", fix="run them one after the other")
    here = find_local_data({name: count for parts in shots for name, count in parts.items()}) if local else {}
    return [_loaded(manager, one, parts, here) for one, parts in zip(wanted, shots, strict=True)]


def multiple_choice(name: str, rows: Sequence[dict[str, Any]]) -> LoadedTask:
    """Make a task of questions that were read from a file: `query`, `choices`, and `gold`, the right one's index."""
    config = {
        "task": name,
        "custom_dataset": lambda **options: {"test": Dataset.from_list(list(rows))},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
        "num_fewshot": 0,
    }
    with quiet():
        task = ConfigurableTask(config=config)
    return LoadedTask(TaskSpec(name, 0, "acc_norm", name), {name: task}, None)


def _shots_of_parts(manager: TaskManager, wanted: Wanted) -> dict[str, int]:
    """List the tasks that are wanted, with their shots, which are equal."""
    found = dict[str, int]()
    for name in _members(manager, wanted.task):
        own = manager.task_index[name].cfg.get("num_fewshot")
        found[name] = int(own or 0) if wanted.shots is None else wanted.shots
    if len(set(found.values())) > 1:
        raise ConfigError(f"the tasks of {wanted.task} have different shots", fix="name them one by one")
    return found


def _loaded(
    manager: TaskManager, wanted: Wanted, shots: Mapping[str, int], here: Mapping[str, LocalData]
) -> LoadedTask:
    configs = [
        {"task": name, "num_fewshot": count}
        | ({"custom_dataset": here[name].load, **here[name].changes} if name in here else {})
        for name, count in shots.items()
    ]
    parts = _built(manager, configs)
    metric = wanted.metric or _first_mean(wanted.task, next(iter(parts.values())))
    spec = TaskSpec(wanted.task, next(iter(shots.values())), metric, wanted.task)
    notes = {note for name in shots if name in here and (note := here[name].note)}
    return LoadedTask(spec, parts, "; ".join(sorted(notes)) or None)


def _first_mean(name: str, task: Task) -> str:
    """Choose the first metric whose value is the mean over questions."""
    found = [metric for metric, aggregation in task.aggregation().items() if aggregation is mean]
    if not found:
        has = ", ".join(task.aggregation())
        raise ConfigError(
            f"{name} has {has}, of which none is a mean over questions", fix="use lm-evaluation-harness itself"
        )
    return str(found[0])


def _built(manager: TaskManager, configs: Sequence[dict[str, Any]]) -> dict[str, Task]:
    """Build tasks with changed settings: the harness takes changes in a group's list of tasks alone."""
    try:
        with quiet():
            loaded = manager.load([{"group": "openelm", "task": list(configs)}])
    except DataError:
        raise
    except Exception as error:  # of the many libraries beneath that fetch and read data
        first, *_ = str(error).splitlines() or [type(error).__name__]
        names = ", ".join(config["task"] for config in configs[:3])
        fix = "check the network, or use --data local"
        raise DataError(f"the data of {names} cannot be loaded: {first}", fix=fix) from error
    return {name.removeprefix("openelm::"): task for name, task in loaded["tasks"].items()}


def _members(manager: TaskManager, name: str) -> list[str]:
    """List the tasks of a group, or the task itself; names that do not exist are told."""
    entry = manager.task_index.get(name)
    if entry is None:
        near = [known for known in manager.all_tasks if name.split("_")[0] in known][:8]
        raise ConfigError(
            f"lm-evaluation-harness {lm_eval.__version__} has no task {name!r}",
            fix=f"near: {', '.join(near)}" if near else "see its list: lm-eval ls tasks",
        )
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    listed = entry.cfg["task"]
    parts = (
        [listed] if isinstance(listed, str) else [part if isinstance(part, str) else part["task"] for part in listed]
    )
    return [member for part in parts for member in _members(manager, part)]


def _manager(names: Sequence[str]) -> TaskManager:
    root = Path(lm_eval.__file__).parent / "tasks"
    with quiet():
        if all(name in _FOLDERS for name in names):
            folders = sorted({str(root / _FOLDERS[name]) for name in names})
            return TaskManager(include_path=list(folders), include_defaults=False)
        return TaskManager()


def _reaches(hub: str) -> bool:
    """Tell whether the hub's data can be fetched: without this, libraries try for minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    if any(os.environ.get(name) for name in ("HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # by another way than a connection of ours
    try:
        with socket.create_connection((hub, 443), timeout=3):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's and the data libraries' own bars and notes off the screen."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
