"""What a ledger says of bad rows that were passed over is derived again from the data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Events, rechain
from .test_forgeries import assert_caught

SKIP = "data.on_bad_row=skip"


@pytest.fixture(scope="module")
def passed_over(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest run on data with bad rows, broken off once."""
    folder = tmp_path_factory.mktemp("spoiled")
    text = folder / "spoiled.jsonl"
    lines = workshop.text.read_text().splitlines()
    text.write_text("".join(f"{line}\n[{number}]\n" for number, line in enumerate(lines)))
    settings = (SKIP, f'data.sources=[{{name = "tiny", paths = ["{text}"]}}]')
    workshop.train(folder / "run", *settings, stop_at=lambda event: event["event"] == "step" and event["step"] == 8)
    workshop.train(folder / "run", *settings)
    workshop.publish(folder / "run")
    return folder / "run"


def test_an_honest_run_is_verified(workshop: Any, passed_over: Path) -> None:
    assert workshop.verify(passed_over, 4).verdict == "verified"


def leave_out(events: Events) -> Events:
    return [event for event in events if event["event"] != "bad_rows"]


def name_other(events: Events) -> Events:
    return [
        {**e, "rows": [{**row, "line": row["line"] + 2} for row in e["rows"]]} if "rows" in e else e for e in events
    ]


def add_one(events: Events) -> Events:
    found = next(event for event in events if event["event"] == "bad_rows")
    listed = {event["step"] for event in events if event["event"] == "bad_rows"}
    place = next(i for i, e in enumerate(events) if e["event"] == "step" and e["step"] not in listed)
    return [*events[:place], {**found, "step": events[place]["step"]}, *events[place:]]


@pytest.mark.parametrize("edit", [leave_out, name_other, add_one])
def test_a_changed_list_is_caught_at_level_2(
    workshop: Any, passed_over: Path, tmp_path: Path, edit: Callable[[Events], Events]
) -> None:
    forged = Path(shutil.copytree(passed_over, tmp_path / "forged"))
    rechain(forged, edit)
    assert_caught(workshop, forged, 2, "rows passed over")
