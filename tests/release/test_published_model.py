"""The published model: it says what it is the mean of, and a lie about that is caught from the files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openelm.files import write_manifest
from openelm.model.folder import read_tensors, weights_sha256

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


def test_a_card_may_be_written_anew(workshop: Any, forged: Path) -> None:
    (forged / "model" / "README.md").write_text("# My model\n")
    write_manifest(forged / "model")
    assert workshop.verify(forged, 0).verdict == "verified"
