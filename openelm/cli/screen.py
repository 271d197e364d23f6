"""Where the command line shows things."""

from __future__ import annotations

from rich.console import Console


class Screen(Console):
    """A console that prints text as it is, and leaves a closed pipe to `main`."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(highlight=False, stderr=stderr)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError
