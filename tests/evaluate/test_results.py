"""A results file is read whole or refused with what is wrong in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openelm.errors import DataError
from openelm.evaluate.results import SuiteResult, TaskResult, read_result

MMLU = {"task": "mmlu", "metric": "acc", "value": 0.25, "low": 0.2, "high": 0.3, "n": 40, "shots": 5, "note": None}
GOOD = {"suite": "openllm", "model": "runs/mine/model", "average": 0.25, "tasks": [MMLU], "seed": 0}


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    expected = TaskResult("mmlu", 5, "acc", 0.25, 0.2, 0.3, 40, None)
    assert read_result(write(tmp_path / "a.json", GOOD)) == SuiteResult(
        "openllm", "runs/mine/model", 0.25, (expected,), "a.json"
    )


def test_an_interval_a_count_a_note_and_an_average_may_be_unknown(tmp_path: Path) -> None:
    bare = {"task": "mmlu", "metric": "acc", "value": 0, "shots": 5}
    read = read_result(write(tmp_path / "a.json", {"suite": "openllm", "model": "m", "tasks": [bare]}))
    assert read.average is None and read.tasks == (TaskResult("mmlu", 5, "acc", 0.0, None, None, None, None),)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suite": "mmlu"}, ["'mmlu'", "zero-shot, openllm, llm360"]),
        ({"suite": None}, ["suite", "missing"]),
        ({"suite": ["openllm"]}, ["suite", "text is expected"]),
        ({"model": ""}, ["model", "text is expected"]),
        ({"average": 25.0}, ["average", "25.0", "divide percent by 100"]),
        ({"average": 0.26}, ["0.2600", "0.2500", "unweighted mean"]),
        ({"average": float("nan")}, ["average", "nan"]),
        ({"tasks": []}, ["tasks", "at least one"]),
        ({"tasks": {"mmlu": 0.25}}, ["tasks", "list"]),
        ({"tasks": ["mmlu"]}, ["task 1", "object"]),
        ({"tasks": [MMLU, MMLU]}, ["mmlu", "twice"]),
    ],
)
def test_what_is_wrong_with_a_result_is_said(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    check(tmp_path / "bad.json", {**GOOD, **change}, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "piqa"}, ["'piqa'", "openllm", "arc_challenge, hellaswag, mmlu"]),
        ({"task": 3}, ["task", "text is expected"]),
        ({"metric": None}, ["metric", "missing"]),
        ({"value": None}, ["value", "missing"]),
        ({"value": True}, ["value", "True"]),
        ({"value": "0.25"}, ["value", "'0.25'"]),
        ({"value": 1.01}, ["value", "1.01", "from 0 to 1"]),
        ({"value": -0.1}, ["value", "-0.1"]),
        ({"low": None}, ["low", "high", "two nulls"]),
        ({"low": 0.4}, ["low", "0.4", "0.3"]),
        ({"shots": None}, ["shots", "missing"]),
        ({"shots": 2.5}, ["shots", "2.5"]),
        ({"n": -1}, ["n", "-1"]),
        ({"note": 3}, ["note", "3"]),
    ],
)
def test_what_is_wrong_with_a_task_is_said(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    check(tmp_path / "bad.json", {**GOOD, "average": None, "tasks": [{**MMLU, **change}]}, words)


def check(path: Path, value: Any, words: list[str], code: str = "E_SCHEMA") -> None:
    with pytest.raises(DataError) as caught:
        read_result(write(path, value))
    line = str(caught.value)
    assert caught.value.code == code and caught.value.fix
    assert all(word in line for word in [*words, str(path)])


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100_000, "1" * 5000])
def test_what_is_not_json_is_named(tmp_path: Path, text: str) -> None:
    check(tmp_path / "bad.json", text, ["not valid JSON"], "E_JSON")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
def test_json_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    check(tmp_path / "bad.json", text, ["an object is expected", "openelm eval"])


def test_bytes_a_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name, code in (("bytes.json", "E_JSON"), ("none.json", "E_PATH"), (".", "E_READ")):
        with pytest.raises(DataError) as caught:
            read_result(tmp_path / name)
        assert caught.value.code == code and str(tmp_path) in str(caught.value)


def test_the_example_on_the_page_is_a_result(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "table.md").read_text("utf-8")
    example = page.partition("```json\n")[2].partition("```")[0]
    read = read_result(write(tmp_path / "example.json", example))
    assert [(task.task, task.value) for task in read.tasks] == [("arc_easy", 0.41)]
