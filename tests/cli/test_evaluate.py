"""`openelm eval` and `openelm compare` on questions of a file, from the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from openelm.cli import main

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"query": f"{n} and {n} is", "choices": [str(2 * n), "nothing at all"], "gold": n % 2} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_results_are_printed_saved_and_the_same_again(
    trained: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(trained / "model"), "--suite", f"choices:{questions}", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "sums" in text and "acc_norm" in text and str(tmp_path / "out") in text
    assert main([*command, "--json", "--batch-tokens", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    (task,) = found["tasks"]
    assert task["n"] == 40 and found["average"] == task["value"] and task["low"] <= task["value"] <= task["high"]
    items = [json.loads(line) for line in next((tmp_path / "out").glob("*.items.jsonl")).read_text().splitlines()]
    assert len(items) == 40 and sum(item["value"] for item in items) / 40 == task["value"]
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert answers.count(b"\n") == 80  # the second start computed nothing
    assert main([*command, "--limit", "3", "--json"]) == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert task["n"] == 3 and "first 3" in task["note"]


def test_a_killed_evaluation_goes_on(trained: Path, questions: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "openelm", "eval", str(trained / "model"), "--suite", f"choices:{questions}"]
    command += ["--batch-tokens", "1", "--json"]
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True).stdout
    answers = tmp_path / "killed" / "answers.jsonl"
    with subprocess.Popen([*command, "--out", str(answers.parent)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (answers.exists() and answers.stat().st_size > 500):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    before = answers.read_bytes()
    again = subprocess.run([*command, "--out", str(answers.parent)], check=True, capture_output=True).stdout
    assert again == whole
    assert answers.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert answers.read_bytes().count(b"\n") == 80


def test_a_model_is_no_better_than_itself(
    trained: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(trained / "model")
    assert main(["compare", model, model, "--suite", f"choices:{questions}"]) == 0
    assert "cannot tell" in capsys.readouterr().out
    assert main(["compare", model, model, "--suite", f"choices:{questions}", "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["differences"]
    assert part["difference"] == part["disagreements"] == 0 and part["verdict"] == "cannot tell"


def test_what_cannot_be_asked_is_told(trained: Path, questions: Path, failed: Callable[..., str]) -> None:
    model = trained / "model"
    assert "zero-shot" in failed(2, "eval", model, "--suite", "nothing")
    assert "TASK@SHOTS" in failed(2, "eval", model, "--suite", "lm-eval:arc_easy@many")
    assert "published" in failed(2, "eval", model, "--suite", f"choices:{questions}", "--against", "published")
    for option in ("--limit", "--batch-tokens"):
        assert "1 or more" in failed(2, "eval", model, "--suite", f"choices:{questions}", option, "0")
    assert "is for questions" in failed(2, "eval", model, "--suite", f"bpb:{questions}", "--limit", "3")
    assert "config.json" in failed(3, "eval", questions.parent, "--suite", f"choices:{questions}")
    assert "no such file" in failed(3, "eval", model, "--suite", "choices:missing.jsonl")
