"""`openelm verify` on the command line: the table, the JSON object, the exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openelm.cli import main

from .conftest import rechain

KEYS = {"verdict", "level", "checked", "not_checked", "first_difference", "seed", "numerics"}


def test_a_table_says_what_was_checked_what_was_not_and_the_verdict(
    honest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(honest), "--level", "3", "--segments", "0", "--seed", "5"]) == 0
    text = capsys.readouterr().out
    assert "checkpoints" in text and "steps 1 to 3" in text
    assert "not drawn" in text and "not asked for" in text
    assert "--seed 5" in text
    assert text.splitlines()[-1] == "verified, level 3 (segments replayed)"


def test_json_has_exactly_the_promised_keys(honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(honest), "--level", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == KEYS
    assert (result["verdict"], result["level"], result["first_difference"]) == ("verified", 0, None)
    assert result["numerics"]["comparison"] == "bitwise"
    assert {note["level"] for note in result["not_checked"]} >= {1, 2, 3, 4}
    assert all(note.keys() == {"level", "what", "detail"} for note in result["checked"] + result["not_checked"])


def test_a_difference_exits_7_in_one_line_after_the_json_object(
    forged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lie(events: Any) -> Any:
        return [{**e, "loss": (1.0).hex()} if e["event"] == "step" and e["step"] == 2 else e for e in events]

    rechain(forged, lie)
    assert main(["verify", str(forged), "--json"]) == 7
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["verdict"], result["level"]) == ("failed", 3)
    assert "step 2: loss" in result["first_difference"]["what"]
    assert err.startswith("openelm: error[E_VERIFY]") and "step 2: loss" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--data", "nothing"], 2, "OLD=NEW"),
        (["--segments", "-1"], 2, "--segments is -1"),
        (["--data", "/=/nowhere/"], 3, "no such file or folder"),
    ],
)
def test_wrong_use_and_missing_data_are_no_verdict(
    honest: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, words: str
) -> None:
    assert main(["verify", str(honest), *more]) == code
    assert words in capsys.readouterr().err


def test_a_folder_that_is_not_there_exits_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "gone")]) == 4
    assert "no such folder" in capsys.readouterr().err
