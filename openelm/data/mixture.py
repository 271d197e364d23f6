"""Interleave sources by their weights in tokens."""

from __future__ import annotations

from collections.abc import Sequence


def choose_source(tokens: Sequence[int], weights: Sequence[float], lane: int) -> int:
    """Choose the source of a lane's next document: the one furthest behind its share of the tokens so far.

    Each source stays within one document of its exact share. Ties go round by lane, so that lanes do not all
    begin with the same source.
    """
    count = len(tokens)
    return min(range(count), key=lambda index: (tokens[index] / weights[index], (index - lane) % count))
