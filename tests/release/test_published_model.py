"""The published model: it says what it is the mean of, and a lie about that is caught from the files alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from openelm.files.published import write_manifest
from openelm.model.folder import read_tensors, weights_sha256

from .conftest import read_lines, write_lines
from .test_forgeries import assert_caught, change_weights


def test_15_published_weights_that_are_not_the_mean(workshop: Any, forged: Path) -> None:
    model = forged / "model"
    change_weights(model / "model.safetensors", 1e-7)
    write_manifest(model)
    result = json.loads((forged / "result.json").read_bytes())
    result["final_weights_sha256"] = weights_sha256(read_tensors(model / "model.safetensors"))
    (forged / "result.json").write_text(json.dumps(result))
    assert_caught(workshop, forged, 0, "mean", "model.safetensors")


def declare(model: Path, **facts: Any) -> None:
    """Change what a published model says about where its weights come from, and take away all that contradicts it."""
    (model / "README.md").unlink(missing_ok=True)
    origin = json.loads((model / "origin.json").read_bytes())
    (model / "origin.json").write_text(json.dumps({**origin, **facts}))
    write_manifest(model)


@pytest.mark.parametrize("steps", [[9, 12], [12], [3, 6, 9, 12]])
def test_15_other_averaged_steps_than_the_true_ones(workshop: Any, forged: Path, steps: list[int]) -> None:
    declare(forged / "model", averaged_steps=steps)
    assert_caught(workshop, forged, 0, "tensor", "differs from the mean", "model.safetensors")


@pytest.mark.parametrize("steps", [[], [0], [7], [9, 24], [12, 9, 6], [6, 9, 9, 12], 12, "6, 9, 12", [True], None])
def test_15_averaged_steps_that_are_none(workshop: Any, forged: Path, steps: Any) -> None:
    declare(forged / "model", averaged_steps=steps)
    assert_caught(workshop, forged, 0, "origin.json", "step")


def test_15_published_weights_of_which_nothing_says_what_they_are(workshop: Any, forged: Path) -> None:
    (forged / "model" / "origin.json").unlink()
    write_manifest(forged / "model")
    assert_caught(workshop, forged, 0, "does not list origin.json")


def test_15_a_card_that_names_other_steps_than_the_true_ones(workshop: Any, forged: Path) -> None:
    card = forged / "model" / "README.md"
    for told, lie in (("6, 9, 12.", "9, 12."), ("9, 12.", "9, 12. Or: the mean of the checkpoints of steps 3.")):
        assert told in card.read_text()
        card.write_text(card.read_text().replace(told, lie))
        write_manifest(forged / "model")
        assert_caught(workshop, forged, 0, "README.md", "6, 9, 12")


def edit_last_line(folder: Path, **fields: Any) -> None:
    events = read_lines(folder)
    write_lines(folder, [*events[:-1], {**events[-1], **fields}])


@pytest.mark.parametrize("fields", [{"seconds": 1.0}, {"dropped": {"tiny": {"empty": 1}}}, {"more": 1}])
def test_20_the_last_line_of_the_ledger_edited(workshop: Any, forged: Path, fields: dict[str, Any]) -> None:
    """No line follows that holds its hash; the model that was averaged afterwards does."""
    assert read_lines(forged)[-1]["event"] == "finish"
    edit_last_line(forged, **fields)
    assert_caught(workshop, forged, 0, "ledger.jsonl", "last lines were changed or removed")


@pytest.mark.parametrize("gone", [1, 2, 5])
def test_20_the_last_lines_of_the_ledger_removed(workshop: Any, forged: Path, gone: int) -> None:
    write_lines(forged, read_lines(forged)[:-gone])
    assert workshop.verify(forged, 0).verdict == "failed"


def test_where_no_model_covers_the_last_line_that_is_said(workshop: Any, forged: Path, tmp_path: Path) -> None:
    def notes(folder: Path) -> list[str]:
        return [note.what for note in workshop.verify(folder, 0).not_checked]

    assert "the last line of the ledger" not in notes(forged)
    workshop.train(forged, "train.steps=15", allow_change=["train.steps"])
    assert "the last line of the ledger" in notes(forged)
    workshop.train(tmp_path / "unpublished")
    edit_last_line(tmp_path / "unpublished", seconds=1.0)
    assert "the last line of the ledger" in notes(tmp_path / "unpublished")


def test_the_heads_hash_is_told_so_that_it_can_be_compared_with_one_that_is_known(workshop: Any, honest: Path) -> None:
    last = (honest / "ledger.jsonl").read_bytes().splitlines()[-1]
    assert hashlib.sha256(last).hexdigest() in workshop.verify(honest, 0).checked[0].detail


def test_a_card_may_be_written_anew(workshop: Any, forged: Path) -> None:
    (forged / "model" / "README.md").write_text("# My model\n")
    write_manifest(forged / "model")
    assert workshop.verify(forged, 0).verdict == "verified"
