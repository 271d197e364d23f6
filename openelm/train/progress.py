"""Watching a run: a live display on a terminal, plain lines elsewhere, and the same numbers to TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from openelm.errors import printable
from openelm.train.ledger import number
from openelm.train.objectives import Preference

_PLAIN_SECONDS = 10.0
_SMOOTHING = 0.95
STATISTICS = Preference.statistics


class ProgressDisplay:
    """Show a run's events; use it as a context manager around `train`.

    Args:
        console: where to show; a live table on a terminal, a line every ten seconds elsewhere.
        steps: the run's last step.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._numbers: dict[str, float] = {}
        self._held_out: float | None = None
        self._seconds_per_step = 0.0
        self._last_line = -math.inf

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one ledger event."""
        kind = event["event"]
        if kind == "step":
            self._numbers = step_numbers(event)
            seconds = event["seconds"]
            before = self._seconds_per_step or seconds
            self._seconds_per_step = _SMOOTHING * before + (1 - _SMOOTHING) * seconds
            self._show_step()
        elif kind == "evaluation":
            self._held_out = number(event["bits_per_byte"])
            self._say(f"step {event['step']}: held-out text costs {self._held_out:.3f} bits per byte")
        elif kind == "sample":
            text = "".join(c if c == "\n" or c.isprintable() else printable(c) for c in event["prompt"] + event["text"])
            self._say(f"step {event['step']}: a sample", *(f"  {line}" for line in text.strip().splitlines()[:6]))
        elif kind in ("examples", "suite"):
            self._say(f"step {event['step']}: {answered(event)}")
        elif kind in ("resume", "skip", "spike", "damage", "nonfinite", "bad_rows"):
            self._say(f"step {event['step']}: {_NOTICES[kind].format(**{'reason': '', **event})}")

    def _show_step(self) -> None:
        if self._live is not None:
            self._live.update(self._table())
        elif time.monotonic() - self._last_line >= _PLAIN_SECONDS or self._numbers["step"] == self._steps:
            self._last_line = time.monotonic()
            self._console.print(
                "  ".join(f"{name} {value}" for name, value in self._cells().items()),
                highlight=False,
                soft_wrap=True,
            )

    def _cells(self) -> dict[str, str]:
        values = self._numbers
        left = (self._steps - values["step"]) * self._seconds_per_step
        cells = {
            "step": f"{values['step']:.0f}/{self._steps}",
            "tokens": f"{values['tokens']:,.0f}",
            "loss": f"{values['loss']:.3f}",
        }
        if "preference_accuracy" in values:
            cells["preferred"] = f"{values['preference_accuracy']:.0%}"
        else:
            cells["bits/byte"] = f"{values['bits_per_byte']:.3f}"
        cells["tokens/s"] = f"{values['tokens_per_second']:,.0f}"
        if "mfu" in values:
            cells["MFU"] = f"{values['mfu']:.0%}"
        cells["left"] = f"{int(left) // 60}:{int(left) % 60:02d}"
        if self._held_out is not None:
            cells["held-out"] = f"{self._held_out:.3f}"
        return cells

    def _table(self) -> Table:
        cells = self._cells()
        table = Table.grid(padding=(0, 2))
        table.add_row(*(f"[dim]{name}[/] [bold]{value}[/]" for name, value in cells.items()))
        outer = Table.grid()
        outer.add_row(ProgressBar(total=self._steps, completed=self._numbers["step"], width=72))
        outer.add_row(table)
        return outer

    def _say(self, *lines: str) -> None:
        for line in lines:
            self._console.print(line, highlight=False, markup=False, style="dim")

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


_NOTICES = {
    "resume": "going on from the checkpoint of this step",
    "skip": "update skipped ({reason}); loss and gradient are in the ledger",
    "bad_rows": "{count} bad rows of the data were passed over; the ledger lists them",
    "spike": "the loss is far above the recent ones; the update was kept",
    "nonfinite": "the loss or gradient is not finite",
    "damage": "a newer checkpoint is damaged and was passed over: {reason}",
}


def step_numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """Turn a step event into plain numbers, with bits per byte of a batch of text among them."""
    loss = number(event["loss"])
    numbers = {
        "step": event["step"],
        "tokens": event["tokens"],
        "loss": loss,
        "gradient_norm": number(event["gradient_norm"]),
        "learning_rate": number(event["learning_rate"]),
        "tokens_per_second": event["tokens_per_second"],
        **{name: number(event[name]) for name in ("mfu", *STATISTICS) if name in event},
    }
    if "preference_accuracy" not in event:  # a pair's loss is no text's
        bits = loss * event["target_tokens"] / math.log(2)
        numbers["bits_per_byte"] = bits / max(1, event["target_bytes"])
    return numbers


def answered(event: Mapping[str, Any]) -> str:
    """Say what an `examples` or a `suite` event measured."""
    if event["event"] == "suite":
        tasks = (f"{task['task']} {number(task['value']):.1%}" for task in event["tasks"])
        return f"{event['suite']}: {', '.join(tasks)}"
    said = f"{event['examples']:,} held-out examples cost {number(event['loss']):.4f} nats"
    if "preference_accuracy" in event:
        return f"{said} a pair; {number(event['preference_accuracy']):.1%} of the chosen answers preferred"
    return f"{said} a token"


class TensorBoard:
    """Write the events to `folder` for TensorBoard; after a resume the void steps are hidden."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one ledger event."""
        if event["event"] in ("start", "resume"):
            self.close()
            from tensorboardX.writer import SummaryWriter  # its import takes a third of a second

            # File names hold whole seconds: two starts within one would write to the same file.
            suffix = f".from-step-{event['step']}"
            self._writer = SummaryWriter(str(self._folder), purge_step=event["step"] + 1, filename_suffix=suffix)
        elif event["event"] == "step":
            for name, value in step_numbers(event).items():
                if name not in ("step", "tokens"):
                    self._writer.add_scalar(f"train/{name}", value, event["step"])
        elif event["event"] == "evaluation":
            self._writer.add_scalar("held_out/bits_per_byte", number(event["bits_per_byte"]), event["step"])
        elif event["event"] == "examples":
            for name in ("loss", *STATISTICS):
                if name in event:
                    self._writer.add_scalar(f"held_out_examples/{name}", number(event[name]), event["step"])
        elif event["event"] == "suite":
            for task in event["tasks"]:
                self._writer.add_scalar(f"suites/{task['task']}", number(task["value"]), event["step"])
        elif event["event"] == "sample":
            self._writer.add_text("sample", f"{event['prompt']}{event['text']}", event["step"])
        elif event["event"] in ("finish", "stop"):
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
