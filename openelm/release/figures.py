"""Choose what the report draws: curves of a run, the values behind them, and the shape of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from urllib.parse import quote

from markupsafe import Markup

from openelm.release import charts
from openelm.release.charts import Level, Marker, Point, Scale, Series, Widths
from openelm.release.record import Baseline, EventLine, Plan, Record, RewindLine, StepLine
from openelm.release.units import significant, spread

CURVE_POINTS = 600
TABLE_ROWS = 12
MARKERS = 60
EVENTS = {
    "resume": "resumed from a checkpoint",
    "rewind": "went back to a checkpoint",
    "skip": "skipped a batch",
    "stop": "stopped on request",
    "spike": "loss spike",
    "nonfinite": "loss or gradient not finite",
    "damage": "passed over a damaged checkpoint",
}


@dataclass(frozen=True)
class Key:
    """A legend entry with its latest value."""

    name: str
    style: str
    value: str


@dataclass(frozen=True)
class Figure:
    """A chart with everything around it."""

    slug: str
    title: str
    unit: str
    svg: Markup
    note: str = ""
    keys: tuple[Key, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    csv: str = ""
    last_step: int = 0


def learning_figure(record: Record, baseline: Baseline | None) -> Figure | None:
    """Draw training and held-out bits per byte over the steps, with the best baseline as a level."""
    scored = [(float(line.step), line.bits_per_byte) for line in record.steps]
    raw, left_out = _drawable(scored, above=0)
    window = len(raw) // 80 * 2 + 1  # odd: as many steps before as after
    smooth = smoothed(record.steps, window) if window > 1 else []
    held_out, _ = _drawable([(float(line.step), line.bits_per_byte) for line in record.held_out], above=0)
    series = [
        Series("training (each step)", "raw" if window > 1 else "train", charts.thin(raw, CURVE_POINTS)),
        Series(f"training (mean of {window} steps)", "train", charts.thin(smooth, CURVE_POINTS)),
        Series("held-out text", "held-out", charts.thin(held_out, CURVE_POINTS), dots=True),
    ]
    values = [py for one in series for _, py in one.points]
    if not values:
        return None
    levels = []
    if baseline is not None and math.isfinite(baseline.bits_per_byte) and baseline.bits_per_byte > 0:
        levels = [Level(baseline.bits_per_byte, f"{baseline.name}: {significant(baseline.bits_per_byte)}")]
        values.append(baseline.bits_per_byte)
    return _figure(
        record, "learning", "Learning curve", "bits per byte, logarithmic scale; lower is better", series,
        charts.log_scale(min(values), max(values)), height=340, levels=levels, left_out=left_out,
    )  # fmt: skip


def smoothed(steps: Sequence[StepLine], window: int) -> list[Point]:
    """Return (step, bits per byte of `window` steps around it together), each step counted by its bytes.

    Near the first step the window shrinks on both sides, so that the steep beginning is not lifted.
    """
    parts = [
        (float(line.step), line.bits, line.target_bytes)
        for line in steps
        if line.bits is not None and line.target_bytes and math.isfinite(line.bits)
    ]
    bits = [0.0, *accumulate(part[1] for part in parts)]
    sizes = [0, *accumulate(part[2] for part in parts)]
    points: list[Point] = []
    for i, (step, _, _) in enumerate(parts):
        reach = min(window // 2, i)
        first, end = i - reach, min(i + reach + 1, len(parts))
        if (mean := (bits[end] - bits[first]) / (sizes[end] - sizes[first])) > 0:
            points.append((step, mean))
    return points


def health_figures(record: Record) -> list[Figure]:
    """Draw learning rate, gradient norm, throughput and MFU; a quantity that was not recorded is left out."""

    def one(slug: str, title: str, unit: str, value: Callable[[StepLine], float | None], log: bool) -> Figure | None:
        points, left_out = _drawable(
            [(float(line.step), value(line)) for line in record.steps], above=0 if log else -math.inf
        )
        if not points:
            return None
        values = [py for _, py in points]
        scale = charts.log_scale(min(values), max(values), 4) if log else charts.linear_scale(0, max(values), 4)
        if scale.exponent:
            unit = f"{unit} × 10{str(scale.exponent).translate(_SUPERSCRIPT)}".strip()
        series = [Series(title.lower() if title != "MFU" else title, "health", charts.thin(points, CURVE_POINTS))]
        return _figure(record, slug, title, unit, series, scale, height=150, left_out=left_out)

    found = (
        one("rate", "Learning rate", "", lambda line: line.learning_rate, False),
        one("gradient", "Gradient norm", "before clipping, logarithmic scale", lambda line: line.gradient_norm, True),
        one("throughput", "Throughput", "tokens per second", lambda line: line.tokens_per_second, False),
        one(
            "mfu",
            "MFU",
            "% of the measured matmul rate",
            lambda line: None if line.mfu is None else 100 * line.mfu,
            False,
        ),
    )
    return [figure for figure in found if figure is not None]


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def layers_figure(plan: Plan, uniform: Plan | None) -> Figure:
    """Draw the widths of each layer, and of a uniform model with as many parameters."""
    first, last = f"{plan.query_heads[0]} query heads and FFN {plan.ffn_dims[0]:,}", plan.ffn_dims[-1]
    description = (
        f"{len(plan.ffn_dims)} layers. Layer 1 has {first}; the last layer has {plan.query_heads[-1]} query heads "
        f"and FFN {last:,}."
    )
    if uniform is not None:
        description += f" The uniform model has {uniform.query_heads[0]} query heads, FFN {uniform.ffn_dims[0]:,}."
    header = ("layer", "query heads", "KV heads", "FFN width")
    columns = zip(plan.query_heads, plan.kv_heads, plan.ffn_dims, strict=True)
    rows = tuple((str(i), *map(str, values)) for i, values in enumerate(columns, start=1))
    return Figure(
        slug="layers",
        title="Width of each layer",
        unit=f"model dim {plan.dim:,}, head dim {plan.head_dim:,}",
        svg=charts.layer_chart("layers", description, _widths(plan), _widths(uniform) if uniform else None),
        header=header,
        rows=rows,
        csv=data_link([header, *rows]),
    )


def _widths(plan: Plan) -> Widths:
    return Widths(plan.query_heads, plan.kv_heads, plan.ffn_dims)


def _drawable(points: Sequence[tuple[float, float | None]], above: float) -> tuple[list[Point], int]:
    """Return the points that an axis can show, and how many recorded ones it cannot."""
    recorded = [(px, py) for px, py in points if py is not None]
    shown = sorted((px, py) for px, py in recorded if math.isfinite(py) and py > above)
    return shown, len(recorded) - len(shown)


def _figure(
    record: Record,
    slug: str,
    title: str,
    unit: str,
    series: Sequence[Series],
    y: Scale,
    *,
    height: int,
    levels: Sequence[Level] = (),
    left_out: int = 0,
) -> Figure:
    series = [one for one in series if one.points]
    x = step_axis(record)
    header = ("step", *(one.name for one in series))
    said = (
        "value that is not finite and above zero is"
        if left_out == 1
        else "values that are not finite and above zero are"
    )
    note = f"{left_out:,} {said} not drawn." if left_out else ""
    drawn = ((one.name, f"{px:.0f}", repr(py)) for one in series for px, py in one.points)
    return Figure(
        slug=slug,
        title=title,
        unit=unit,
        svg=charts.line_chart(
            slug, " ".join(charts.describe(one, unit) for one in series), series, x, y,
            height=height, levels=levels, markers=markers(record, x),
        ),
        note=note,
        keys=tuple(Key(one.name, one.style, significant(one.points[-1][1])) for one in series),
        header=header,
        rows=_rows(series),
        csv=data_link([("series", "step", "value"), *drawn]),
        last_step=max(int(one.points[-1][0]) for one in series),
    )  # fmt: skip


def step_axis(record: Record) -> Scale:
    """Return the x axis that all curves of a run share."""
    lines = (*record.steps, *record.held_out, *notable(record.events))
    return charts.step_scale(0, max(line.step for line in lines))


def notable(events: Sequence[EventLine]) -> list[EventLine]:
    """Return the events to show; a rewind that made nothing void is only bookkeeping."""
    return [
        event
        for event in events
        if event.event in EVENTS and not (isinstance(event, RewindLine) and event.to >= event.step)
    ]


def markers(record: Record, x: Scale) -> list[Marker]:
    """Return the events to mark, at most one of a kind in each sixtieth of the axis."""
    found: dict[int, dict[str, Marker]] = {}
    for event in notable(record.events):
        beside = found.setdefault(int(x.at(event.step) * MARKERS), {})
        label = f"step {event.step:,}: {EVENTS[event.event]}"
        beside.setdefault(event.event, Marker(event.step, event.event, label, place=len(beside)))
    return [marker for beside in found.values() for marker in beside.values()]


def _rows(series: Sequence[Series]) -> tuple[tuple[str, ...], ...]:
    """Return a few steps, evenly chosen, with each curve's latest value by then."""
    fewest = min(series, key=lambda one: len(one.points))
    rows = []
    for step in spread([int(px) for px, _ in fewest.points], TABLE_ROWS):
        past = [[py for px, py in one.points if px <= step] for one in series]
        rows.append((f"{step:,}", *(significant(values[-1]) if values else "–" for values in past)))
    return tuple(rows)


def data_link(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a CSV file inside a `data:` address; no cell holds a comma or a quote."""
    return "data:text/csv;charset=utf-8," + quote("\n".join(map(",".join, rows)), safe=",()")
