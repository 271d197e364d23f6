"""Charts: scales, ticks, and where a value lands in the drawing."""

from __future__ import annotations

import math
import re

import pytest
from markupsafe import Markup

from openelm.release import charts
from openelm.release.charts import Level, Marker, Series, Widths


def numbers(pattern: str, svg: Markup) -> list[float]:
    return [float(found) for found in re.findall(pattern, svg)]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, (0, 2, 4, 6, 8, 10)),
        (0, 0.003, (0, 0.001, 0.002, 0.003)),
        (-3, 97, (-20, 0, 20, 40, 60, 80, 100)),
        (7, 7, (2, 4, 6, 8, 10, 12)),
    ],
)
def test_a_linear_axis_covers_its_range_with_round_ticks(low, high, ticks):
    scale = charts.linear_scale(low, high)
    assert scale.ticks == pytest.approx(ticks)
    assert (scale.low, scale.high) == pytest.approx((ticks[0], ticks[-1]))


@pytest.mark.parametrize(("low", "high"), [(1.7, 6.5), (0.3, 5), (1e-6, 1e6), (2, 2), (3.07, 3.11), (0.99, 1.02)])
def test_a_logarithmic_axis_covers_its_range_with_a_readable_number_of_ticks(low, high):
    scale = charts.log_scale(low, high)
    assert scale.low < low <= high < scale.high
    assert 1 <= len(scale.ticks) <= 8
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)


def test_equal_ratios_are_equal_distances_on_a_logarithmic_axis():
    scale = charts.Scale(1, 100, (), log=True)
    assert [scale.at(value) for value in (1, 10, 100)] == pytest.approx([0, 0.5, 1])


def test_small_values_take_their_power_of_ten_out_of_the_labels():
    scale = charts.linear_scale(0, 0.003)
    assert scale.exponent == -3
    assert [scale.label(tick) for tick in scale.ticks] == ["0", "1", "2", "3"]


def test_large_values_share_one_suffix():
    assert [charts.linear_scale(0, 10_000, 4).label(tick) for tick in (0, 2500, 10_000)] == ["0", "2.5k", "10k"]


def test_a_step_axis_has_whole_numbers_only():
    assert charts.step_scale(0, 3).ticks == (0, 1, 2, 3)
    assert charts.step_scale(0, 0).ticks == (0, 1)


def test_a_known_point_lands_at_its_place():
    x, y = charts.Scale(0, 200, (0, 100, 200)), charts.Scale(0, 8, (0, 4, 8))
    curve = Series("curve", "train", ((0.0, 0.0), (50.0, 2.0), (200.0, 8.0)))
    dots = Series("dots", "held-out", ((150.0, 6.0),), dots=True)
    svg = charts.line_chart(
        "a", "", [curve, dots], x, y, height=100, markers=[Marker(20, "skip", "")], levels=[Level(4, "half")]
    )
    assert re.search(r'class="line train" d="([^"]*)"', svg)[1] == "M0.0 1000.0L250.0 750.0L1000.0 0.0"
    assert 'cx="75%" cy="25%"' in svg
    assert '<line x1="10%" x2="10%"' in svg
    assert '<line class="level" x1="0" x2="100%" y1="50%" y2="50%"/>' in svg
    assert numbers(r'class="grid"[^>]* y1="([\d.]+)%"', svg) == [100, 50, 0]


def test_thinning_keeps_the_extremes_and_the_order():
    points = [(float(i), math.sin(i)) for i in range(10_000)]
    points[4321] = (4321.0, 50.0)
    points[4322] = (4322.0, -50.0)
    kept = charts.thin(points, 600)
    assert len(kept) <= 600
    assert {(4321.0, 50.0), (4322.0, -50.0)} <= set(kept)
    assert list(kept) == sorted(kept)
    assert set(kept) <= set(points)


def test_few_points_are_not_thinned():
    points = [(float(i), 1.0) for i in range(600)]
    assert charts.thin(points, 600) == tuple(points)


def test_layer_bars_are_as_wide_as_their_layers():
    svg = charts.layer_chart("layers", "", Widths((2, 4), (1, 2), (100, 400)), Widths((3, 3), (1, 1), (250, 250)))
    wing = charts.WING
    assert numbers(r'class="queries"[^>]* width="([\d.]+)%"', svg) == pytest.approx([wing / 2, wing])
    assert numbers(r'class="keys"[^>]* width="([\d.]+)%"', svg) == pytest.approx([wing / 4, wing / 2])
    assert numbers(r'class="ffn"[^>]* width="([\d.]+)%"', svg) == pytest.approx([wing / 4, wing])
    tops = numbers(r'class="ffn"[^>]* y="(\d+)"', svg)
    assert tops[0] > tops[1]  # the input is at the bottom
    edges = [10 * (charts.CENTRE - charts.GAP - wing * 3 / 4), 10 * (charts.CENTRE + charts.GAP + wing * 250 / 400)]
    assert numbers(r'uniform" d="M([\d.]+) 1000', svg) == pytest.approx(edges, abs=0.05)


def test_a_bar_ends_at_its_share_of_the_scale():
    svg = charts.bar(2, 8, "train", (1, 4))
    assert 'width="25%"' in svg
    assert 'x1="12.5%" x2="50%"' in svg


def test_labels_are_escaped():
    scale = charts.Scale(0, 1, ())
    svg = charts.line_chart("a", "<b>", [], scale, scale, height=9, levels=[Level(0.5, "<i>")])
    assert "<b>" not in svg and "<i>" not in svg and "&lt;i&gt;" in svg
