"""Where the command line shows things."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Screen(Console):
    """A console that prints text as it is, and leaves a closed pipe to `main`."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(highlight=False, stderr=stderr)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class WorkBar:
    """A bar on a terminal, a line every ten seconds elsewhere.

    Args:
        amount: the bar's column that says how much is done.
        line: says it elsewhere, with `what`, `done` and `total` in braces.
    """

    def __init__(self, console: Console, amount: ProgressColumn, line: str) -> None:
        self._console, self._line, self._last = console, line, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            if what not in self._tasks:
                self._tasks[what] = self._progress.add_task(what, total=max(1, total))
            self._progress.update(self._tasks[what], completed=done)
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            text = self._line.format(what=what, done=done, total=total)
            self._console.print(text, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
