"""The ledger: chained lines, exact numbers, torn ends put aside, history never rewritten."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from openelm.errors import CheckpointError, DiskError
from openelm.files.hashes import sha256_bytes
from openelm.train.ledger import FIRST, Ledger, number, read_ledger, valid_events


def write(path: Path, *events: dict[str, Any]) -> list[bytes]:
    with Ledger(path) as ledger:
        for event in events:
            ledger.append(event)
    return path.read_bytes().splitlines()


EVENTS = [{"event": "start", "step": 0}, *({"event": "step", "step": k, "loss": (1 / k).hex()} for k in range(1, 6))]


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    write(tmp_path / "ledger.jsonl", *EVENTS)
    return tmp_path / "ledger.jsonl"


def test_each_line_holds_the_hash_of_the_line_before_it(ledger: Path) -> None:
    lines = ledger.read_bytes().splitlines()
    expected = [FIRST, *(sha256_bytes(line) for line in lines)]
    assert [json.loads(line)["prev"] for line in lines] == expected[:-1]
    with Ledger(ledger) as opened:
        assert opened.head == expected[-1]


def test_what_was_written_is_read(ledger: Path) -> None:
    assert [{key: value for key, value in event.items() if key != "prev"} for event in read_ledger(ledger)] == EVENTS


def test_a_last_line_torn_at_any_byte_is_put_aside_and_writing_goes_on(ledger: Path) -> None:
    whole = ledger.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(whole) - len(lines[-1])
    for end in range(start, len(whole)):
        ledger.write_bytes(whole[:end])
        ledger.with_suffix(".torn").unlink(missing_ok=True)
        assert len(read_ledger(ledger)) == len(lines) - 1
        write(ledger, {"event": "resume", "step": 4})
        torn = whole[start:end]
        assert (ledger.with_suffix(".torn").read_bytes() if torn else b"") == torn
        assert ledger.read_bytes().startswith(whole[:start])
        assert [event["event"] for event in read_ledger(ledger)][-2:] == ["step", "resume"]


def test_a_changed_byte_anywhere_before_the_last_line_is_named(ledger: Path) -> None:
    whole = ledger.read_bytes()
    lines = whole.splitlines(keepends=True)
    for place in range(len(whole) - len(lines[-1])):
        ledger.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        line = whole[:place].count(b"\n") + 1
        with pytest.raises(CheckpointError) as caught:
            read_ledger(ledger)
        assert caught.value.line in (line, line + 1)
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("removed", range(5))
def test_a_removed_line_is_named(ledger: Path, removed: int) -> None:
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:removed] + lines[removed + 1 :]))
    with pytest.raises(CheckpointError) as caught:
        read_ledger(ledger)
    assert caught.value.line == removed + 1


@pytest.mark.parametrize(
    "text", [b"[]\n", b"3\n", b'"prev"\n', b"null\n", b"\n", b"\xff\n", b"{}\n", b"[" * 9999 + b"\n"]
)
def test_a_line_that_is_no_event_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_ledger(tmp_path / "ledger.jsonl")
    assert caught.value.line == 1


def test_a_line_without_an_event_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text(json.dumps({"prev": FIRST}) + "\n")
    with pytest.raises(CheckpointError):
        valid_events(read_ledger(tmp_path / "ledger.jsonl"))


@pytest.mark.parametrize("value", [0.1, -0.0, 1e-320, 1.7976931348623157e308, math.inf, -math.inf, 2 / 3])
def test_hex_floats_come_back_to_the_bit(tmp_path: Path, value: float) -> None:
    write(tmp_path / "ledger.jsonl", {"event": "step", "step": 1, "loss": value.hex()})
    found = number(read_ledger(tmp_path / "ledger.jsonl")[0]["loss"])
    assert found.hex() == value.hex()


def test_a_number_may_be_plain_or_not_a_number() -> None:
    assert number(3) == 3.0
    assert math.isnan(number(math.nan.hex()))


def test_a_rewind_voids_later_steps_and_keeps_the_ones_before(tmp_path: Path) -> None:
    def step(at: int, mark: str) -> dict[str, Any]:
        return {"event": "step", "step": at, "mark": mark}

    events = [
        {"event": "start", "step": 0},
        *(step(at, "a") for at in (1, 2, 3)),
        {"event": "checkpoint", "step": 3},
        step(4, "a"),
        {"event": "rewind", "step": 4, "to": 3},
        {"event": "resume", "step": 3},
        *(step(at, "b") for at in (4, 5)),
        {"event": "rewind", "step": 5, "to": 2},
        *(step(at, "c") for at in (3, 4)),
    ]
    valid = valid_events(events)
    marks = [(event["step"], event["mark"]) for event in valid if event["event"] == "step"]
    assert marks == [(1, "a"), (2, "a"), (3, "c"), (4, "c")]
    assert valid_events(valid) == valid
    assert not [event for event in valid if event["event"] in ("checkpoint", "resume")]


def test_events_that_are_not_json_numbers_are_our_own_bug(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger, pytest.raises(ValueError, match="JSON"):
        ledger.append({"event": "step", "loss": math.nan})


def test_text_with_line_ends_and_other_scripts_stays_on_one_line(tmp_path: Path) -> None:
    text = 'a\nb\r\u2028"\\ ü 你 🦙 \x00'
    lines = write(tmp_path / "ledger.jsonl", {"event": "sample", "step": 1, "text": text}, {"event": "finish"})
    assert len(lines) == 2
    assert read_ledger(tmp_path / "ledger.jsonl")[0]["text"] == text


def test_a_missing_ledger_has_no_events(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "none.jsonl") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_a_disk_error_also_when_the_ledger_is_closed(tmp_path: Path) -> None:
    """What could not be written is tried again at close: the second failure must not hide the first."""
    (tmp_path / "ledger.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(DiskError, match="No space left"),
        _ledger_on_full_device(tmp_path / "ledger.jsonl") as ledger,
    ):
        ledger.append({"event": "step", "step": 1})


def _ledger_on_full_device(path: Path) -> Ledger:
    ordinary = path.with_name("ordinary.jsonl")
    ledger = Ledger(ordinary)
    ledger._file.close()
    ledger._file = os.fdopen(os.open(path, os.O_WRONLY), "ab")
    return ledger
