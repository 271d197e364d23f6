"""Where the command line shows things."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

from openelm.errors import printable

SECONDS_BETWEEN_LINES = 10.0


class Screen(Console):
    """A console that prints text as it is, without its control characters, and leaves a closed pipe to `main`."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(highlight=False, stderr=stderr)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts unwrapped, brackets and all; a name or a path cannot move the cursor or change colours."""
        if all(isinstance(text, str) for text in objects):
            options = {"markup": False, "emoji": False, "soft_wrap": True, **options}
            objects = tuple("\n".join(map(printable, text.split("\n"))) for text in objects)
        super().print(*objects, **options)

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
            self._console.print(self._line.format(what=what, done=done, total=total))

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
