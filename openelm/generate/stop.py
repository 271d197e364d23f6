"""Find stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Let text through except a stop string, wherever the pieces are cut.

    Text that could be the start of a stop string is held back until it is clear. The stop string that
    completes first wins (and of those the longest), so the result does not depend on the cuts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that is now clear. `found` turns true at a stop string, and stays."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held_characters = max((_overlap(text, stop) for stop in self._stops), default=0)
        clear = len(text) - held_characters
        self._held = text[clear:]
        return text[:clear]

    def finish(self) -> str:
        """End the text; returns what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
