"""Watching a run: plain lines in a pipe, a table on a terminal, the same numbers in TensorBoard's files."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from openelm.train.progress import ProgressDisplay, TensorBoard, step_numbers


def step(at: int, loss: float = 2.5, **more: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "step": at,
        "tokens": 64 * at,
        "target_tokens": 60,
        "target_bytes": 120,
        "loss": loss.hex(),
        "z_loss": (0.01).hex(),
        "gradient_norm": loss.hex(),
        "learning_rate": (0.01).hex(),
        "seconds": 0.5,
        "tokens_per_second": 128.0,
        "mfu": 0.25,
        **more,
    }


OTHER_EVENTS = [
    {"event": "start", "step": 0},
    {"event": "evaluation", "step": 2, "bits_per_byte": (1.5).hex(), "documents": 3},
    {"event": "sample", "step": 2, "prompt": "[bold]To be\n", "text": "or \x1b[31mnot[/]\x07 {x}"},
    {"event": "damage", "step": 2, "reason": "file=a{b}[red]"},
    {"event": "rewind", "step": 2, "to": 1},
    {"event": "resume", "step": 1},
    {"event": "skip", "step": 2, "reason": "nonfinite"},
    {"event": "spike", "step": 2, "reason": "spike"},
    {"event": "nonfinite", "step": 2, "reason": "nonfinite"},
    {"event": "checkpoint", "step": 2, "folder": "x"},
    {"event": "stop", "step": 2, "reason": "SIGTERM"},
    {"event": "finish", "step": 2, "seconds": 1.0},
]


def shown(events: list[dict[str, Any]], *, terminal: bool, width: int = 100) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width)
    with ProgressDisplay(console, 2) as display:
        for event in events:
            display(event)
    return file.getvalue()


def test_plain_lines_hold_the_numbers_and_no_control_characters() -> None:
    text = shown([OTHER_EVENTS[0], step(1), step(2), *OTHER_EVENTS[1:]], terminal=False)
    assert "\x1b" not in text and "\x07" not in text
    last = next(line for line in text.splitlines() if line.startswith("step 2/2"))
    assert "loss 2.500" in last and "tokens 128" in last and "left 0:00" in last
    assert "held-out text costs 1.500 bits per byte" in text
    assert "[bold]To be" in text and "{x}" in text
    assert "file=a{b}[red]" in text
    assert "update skipped (nonfinite)" in text


def test_plain_lines_are_few() -> None:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file, width=200), 1000) as display:
        for at in range(1, 1001):
            display(step(at))
    assert len(file.getvalue().splitlines()) < 10


@pytest.mark.parametrize("width", [20, 80, 200])
def test_a_terminal_gets_a_table(width: int) -> None:
    text = shown([OTHER_EVENTS[0], step(1), step(2), *OTHER_EVENTS[1:]], terminal=True, width=width)
    assert "\x1b[" in text
    assert "\x07" not in text and "\x1b[31m" not in text.replace("\x1b[31m ", "")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0, 1e300])
def test_no_loss_breaks_the_display(terminal: bool, loss: float) -> None:
    assert shown([step(1, loss), step(2, loss, tokens_per_second=0.0, mfu=0.0)], terminal=terminal)


def test_bits_per_byte_of_a_batch() -> None:
    assert step_numbers(step(1, math.log(2)))["bits_per_byte"] == pytest.approx(60 / 120)
    assert math.isfinite(step_numbers(step(1, target_bytes=0))["bits_per_byte"])


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Read event files without TensorBoard: records of (length, crc, data, crc), data a protocol buffer."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_files_hold_the_numbers_of_every_step(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for event in [OTHER_EVENTS[0], step(1), step(2, 2.25), *OTHER_EVENTS[1:]]:
        board(event)
    found = scalars(tmp_path)
    assert found["train/loss"] == {1: 2.5, 2: 2.25}
    assert found["held_out/bits_per_byte"] == {2: 1.5}


def test_tensorboard_survives_a_break_and_a_resume(bench: Any, tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard")
    with pytest.raises(RuntimeError):
        bench.train(tmp_path, observers=(board, _raise_at(8)))
    board.close()
    again = TensorBoard(tmp_path / "tensorboard")
    bench.train(tmp_path, observers=(again,))
    again.close()
    assert sorted(scalars(tmp_path / "tensorboard")["train/loss"]) == list(range(1, 13))


def _raise_at(at: int) -> Any:
    def observer(event: Any) -> None:
        if event["event"] == "step" and event["step"] == at:
            raise RuntimeError

    return observer


def test_tensorboard_survives_a_finished_run_made_longer(bench: Any, tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard")
    bench.train(tmp_path, observers=(board,))
    again = TensorBoard(tmp_path / "tensorboard")
    bench.train(tmp_path, "train.steps=14", allow_change=["train.steps"], observers=(again,))
    again.close()
    assert max(scalars(tmp_path / "tensorboard")["train/loss"]) == 14


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_tensorboard_takes_numbers_that_are_not_finite(tmp_path: Path, loss: float) -> None:
    board = TensorBoard(tmp_path)
    board({"event": "start", "step": 0})
    board(step(1, loss))
    board.close()
    assert "train/loss" in scalars(tmp_path)
