"""`average`, `report` and `eval` on a finished run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from openelm.cli import main
from openelm.files.published import verify_folder
from openelm.model.folder import load_model, weights_sha256
from openelm.train.average import average_checkpoints


def test_an_average_is_a_whole_model_folder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["average", str(trained), "--last", "3", "--out", str(tmp_path / "model")]) == 0
    assert "2, 4, 6" in capsys.readouterr().out
    verify_folder(tmp_path / "model")
    expected, _ = average_checkpoints(trained, 3)
    assert weights_sha256(load_model(tmp_path / "model").state_dict()) == weights_sha256(expected)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.model", "generation_config.json", "README.md"}


def test_an_average_replaces_the_one_before(trained: Path, tmp_path: Path) -> None:
    for last in ("3", "1"):
        assert main(["average", str(trained), "--last", last, "--out", str(tmp_path / "model")]) == 0
    expected, _ = average_checkpoints(trained, 1)
    assert weights_sha256(load_model(tmp_path / "model").state_dict()) == weights_sha256(expected)


def test_a_report_is_one_page_that_asks_the_network_for_nothing(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(trained), "--out", str(page)]) == 0
    text = page.read_text()
    assert not re.search(r'(src|href)="?(https?:)?//', text)
    assert "finished at step 6" in text


def test_the_commands_a_report_shows_exist(trained: Path, tmp_path: Path) -> None:
    from openelm.cli.main import _HANDLERS, build_parser
    from openelm.release.record import read_run
    from openelm.release.report import commands

    shown = [line.split()[1:] for line in commands(read_run(trained)) if line.startswith("openelm ")]
    assert shown
    assert {words[0] for words in shown} <= set(_HANDLERS)
    for words in shown:
        build_parser().parse_args(words)


def test_an_evaluation_prints_one_json_object(
    trained: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["eval", str(trained / "model"), "--suite", f"bpb:{text_folder}/0*.txt", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    score = json.loads(line)
    assert score["documents"] == 10 == len(score["per_document"])
    assert score["low"] < score["value"] < score["high"]
    assert score["bytes"] == sum(len((text_folder / f"0{at}.txt").read_bytes()) for at in range(10))
    assert 0.5 < score["value"] < 8


def test_an_evaluation_prints_a_table(trained: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained / "model"), "--suite", f"bpb:{text_folder / '00.txt'}"]) == 0
    text = capsys.readouterr().out
    assert "00.txt" in text and re.search(r"bits per byte \d\.\d{4}", text)


def test_a_finished_run_starts_again_without_training(
    recipe: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "ledger.jsonl").read_bytes()
    assert main(["train", str(recipe), "--out", str(trained)]) == 0
    assert (trained / "ledger.jsonl").read_bytes() == before
