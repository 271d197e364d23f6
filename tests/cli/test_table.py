"""`openelm table` prints the published tables, puts results among them, and refuses files it cannot read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from openelm.cli import main

Failed = Callable[..., str]
CaptureFixture = pytest.CaptureFixture[str]
TITLES = {
    "zero-shot": "Zero-shot",
    "openllm": "OpenLLM leaderboard",
    "llm360": "LLM360",
    "commonsense": "Commonsense (fine-tuned, not zero-shot)",
}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    task = {"task": "sciq", "metric": "acc", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "shots": 0, "note": "dev"}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"suite": "zero-shot", "model": "mine", "average": None, "tasks": [task]}))
    return path


def test_without_results_all_published_tables_are_printed(capsys: CaptureFixture) -> None:
    assert main(["table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in TITLES.values()] == list(TITLES.values())
    assert sum(line.startswith("OpenELM-1.1B-Instruct ") for line in lines) == 3


@pytest.mark.parametrize("suite", TITLES)
def test_one_suite_is_one_table(suite: str, capsys: CaptureFixture) -> None:
    assert main(["table", "--suite", suite]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line in TITLES.values()] == [TITLES[suite]]


def test_a_result_is_a_marked_row_with_its_interval_and_footnote(mine: Path, capsys: CaptureFixture) -> None:
    assert main(["table", str(mine), "--suite", "zero-shot"]) == 0
    text = capsys.readouterr().out
    (row,) = [line for line in text.splitlines() if line.startswith("mine (ours) ")]
    assert "50.00 ± 10.00 [1]" in row and row.endswith("ours: mine.json")
    assert "[1] dev\n" in text


def test_json_is_one_object_that_tells_measured_from_published(mine: Path, capsys: CaptureFixture) -> None:
    assert main(["table", str(mine), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    suites = {suite["suite"]: suite["rows"] for suite in json.loads(line)["suites"]}
    assert list(suites) == list(TITLES)
    measured = [row for rows in suites.values() for row in rows if row["measured"]]
    assert [(row["model"], row["tasks"]["sciq"]["percent"], row["tasks"]["piqa"]) for row in measured] == [
        ("mine", 50.0, None)
    ]


@pytest.mark.parametrize("layout", ["text", "md", "csv", "html"])
def test_a_file_holds_what_would_be_printed(layout: str, mine: Path, tmp_path: Path, capsys: CaptureFixture) -> None:
    assert main(["table", str(mine), "--format", layout]) == 0
    printed = capsys.readouterr().out
    assert main(["table", str(mine), "--format", layout, "--out", str(tmp_path / "table")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "table").read_text("utf-8") == printed


def test_a_result_of_another_suite_is_left_out_and_that_is_said(mine: Path, capsys: CaptureFixture) -> None:
    assert main(["table", str(mine), "--suite", "llm360"]) == 0
    out, error = capsys.readouterr()
    assert "(ours)" not in out
    assert error == "openelm: mine.json is of zero-shot, left out\n"


@pytest.mark.parametrize("text", [None, "", "{}", '{"value": 2.1, "documents": 3}'])
def test_a_file_that_is_no_result_is_exit_3_and_named(tmp_path: Path, failed: Failed, text: str | None) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    line = failed(3, "table", path)
    assert str(path) in line and "openelm eval" in line


def test_a_file_that_cannot_be_written_is_exit_5(tmp_path: Path, failed: Failed) -> None:
    (tmp_path / "file").write_text("x")
    assert "--out" in failed(5, "table", "--out", tmp_path / "file" / "table.html")


@pytest.mark.parametrize("arguments", [["--suite", "mmlu"], ["--format", "pdf"], ["--json", "--format", "csv"]])
def test_wrong_options_are_exit_2(arguments: list[str], capsys: CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["table", *arguments])
    assert caught.value.code == 2
    assert "usage: openelm table" in capsys.readouterr().err
