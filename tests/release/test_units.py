"""Counts, sizes and times as people read them."""

from __future__ import annotations

import pytest

from openelm.release import units


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.74239, "1.742"), (33120.4, "33,120"), (0.0003, "0.0003"), (0, "0"), (float("nan"), "not finite")],
)
def test_significant(value, text):
    assert units.significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(271_527_168, "272 M"), (999_900, "1.00 M"), (81_920, "81.9 k"), (40, "40"), (1.5e12, "1.50 T")]
)
def test_count(value, text):
    assert units.count(value).replace(units.NARROW_SPACE, " ") == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (5_458_199, "5.46 MB")])
def test_size(value, text):
    assert units.size(value).replace(units.NARROW_SPACE, " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (12.34, "12.3 s"), (563, "9 min 23 s"), (3600, "1 h"), (90_000, "1 d 1 h")]
)
def test_duration(seconds, text):
    assert units.duration(seconds).replace(units.NARROW_SPACE, " ") == text


def test_spread_keeps_the_ends():
    assert units.spread(range(100), 4) == [0, 33, 66, 99]
    assert units.spread([1, 2], 4) == [1, 2]
