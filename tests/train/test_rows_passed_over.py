"""The ledger lists the bad rows of the data that were passed over, whatever happens to the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openelm.train.ledger import read_ledger, valid_events

from .conftest import sentences
from .test_processes import EXACT


@pytest.fixture
def spoiled(tmp_path: Path) -> str:
    """The setting for a file in which two rows of three are no objects."""
    path = tmp_path / "spoiled.jsonl"
    rows = [json.dumps({"text": sentences(seed, 1)}) if seed % 3 == 0 else f"[{seed}]" for seed in range(90)]
    path.write_text("\n".join(rows) + "\n")
    return f'data.sources=[{{name = "tiny", paths = ["{path}"]}}]'


def listings(folder: Path) -> list[tuple[Any, ...]]:
    events = valid_events(read_ledger(folder / "ledger.jsonl"))
    return [(event["step"], event["count"], event["rows"]) for event in events if event["event"] == "bad_rows"]


def test_a_run_broken_off_and_resumed_lists_what_an_undisturbed_one_lists(
    bench: Any, tmp_path: Path, spoiled: str
) -> None:
    settings = (spoiled, "data.on_bad_row=skip")
    bench.train(tmp_path / "whole", *settings)
    for step in (2, 4, 8):
        bench.train_until(tmp_path / "broken", step, *settings)
    bench.train(tmp_path / "broken", *settings)
    found = listings(tmp_path / "whole")
    assert sum(count for _, count, _ in found) > 10
    assert all(row["code"] == "E_SCHEMA" and row["file"] == "spoiled.jsonl" for _, _, rows in found for row in rows)
    assert listings(tmp_path / "broken") == found


def test_two_processes_list_what_one_lists(bench: Any, launch: Any, tmp_path: Path, spoiled: str) -> None:
    settings = (*EXACT, spoiled, "data.on_bad_row=skip")
    bench.train(tmp_path / "one", *settings)
    launch.run(tmp_path / "two", 2, *settings)
    assert listings(tmp_path / "one")
    assert listings(tmp_path / "two") == listings(tmp_path / "one")
