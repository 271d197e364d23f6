"""Answers that were known are not computed again, and those of another model are never taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from openelm.errors import ConfigError
from openelm.evaluate.answers import Answers
from openelm.evaluate.trees import Answer

TEXTS = {((1, 2), ("\n",), 8): "a\ud800\u2028 b", ((1, 2), ("\n", "."), 8): "", ((1, 2), ("\n",), 9): "c\n"}
FOUND = {((1, 2), (3,)): Answer(-1.25, True), ((1, 2), (4, 5)): Answer(-0.1 - 0.2, False)}


def written(path: Path, model: str = "a") -> None:
    with Answers(path, model) as answers:
        for pair, answer in FOUND.items():
            answers.add([(answers.key(*pair), answer)])
        for writing, text in TEXTS.items():
            answers.add_text(answers.text_key(*writing), text)


def test_answers_come_back_to_the_bit(tmp_path: Path) -> None:
    written(tmp_path / "answers.jsonl")
    with Answers(tmp_path / "answers.jsonl", "a") as answers:
        assert {pair: answers.find(answers.key(*pair)) for pair in FOUND} == FOUND
        assert {writing: answers.find_text(answers.text_key(*writing)) for writing in TEXTS} == TEXTS


def test_other_models_prompts_and_answers_are_not_known(tmp_path: Path) -> None:
    written(tmp_path / "answers.jsonl")
    with Answers(tmp_path / "answers.jsonl", "b") as answers:
        assert all(answers.find(answers.key(*pair)) is None for pair in FOUND)
        assert all(answers.find_text(answers.text_key(*writing)) is None for writing in TEXTS)
    with Answers(tmp_path / "answers.jsonl", "a") as answers:
        for other in (((1, 2), (5,)), ((1,), (2, 3)), ((1, 2, 3), ())):
            assert answers.find(answers.key(*other)) is None
        for writing in (((1,), ("\n",), 8), ((1, 2), (), 8), ((1, 2), ("\n",), 7)):
            assert answers.find_text(answers.text_key(*writing)) is None


@pytest.mark.parametrize("kept", range(0, 480, 7))
def test_a_file_that_ends_anywhere_gives_whole_answers_alone(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "answers.jsonl"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    with Answers(path, "a") as answers:
        known = {pair for pair in FOUND if answers.find(answers.key(*pair)) is not None}
        texts = {writing for writing in TEXTS if answers.find_text(answers.text_key(*writing)) is not None}
        assert len(known) + len(texts) == whole[:kept].count(b"\n")
        answers.add((answers.key(*pair), FOUND[pair]) for pair in FOUND if pair not in known)
        for writing in TEXTS.keys() - texts:
            answers.add_text(answers.text_key(*writing), TEXTS[writing])
    with Answers(path, "a") as answers:
        assert {pair: answers.find(answers.key(*pair)) for pair in FOUND} == FOUND
        assert {writing: answers.find_text(answers.text_key(*writing)) for writing in TEXTS} == TEXTS


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    written(path)
    first, second, *_ = path.read_bytes().split(b"\n")
    for damage in (b"\x00" * 40, b'["key"]', b'["key", "1.0", true]', b"{}"):
        path.write_bytes(damage + b"\n" + second + b"\n")
        with Answers(path, "a") as answers:
            assert [answers.find(answers.key(*pair)) for pair in FOUND] == [None, FOUND[(1, 2), (4, 5)]]
    assert first


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with (
        Answers(tmp_path / "answers.jsonl", "a"),
        pytest.raises(ConfigError, match="another process"),
        Answers(tmp_path / "answers.jsonl", "a"),
    ):
        pass
    with Answers(tmp_path / "answers.jsonl", "a"):
        pass
