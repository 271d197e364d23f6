"""Draw charts as inline SVG: positions in percent, so that text keeps its size at every width.

Curves live in a nested SVG with the coordinates 0 to 1000 on both axes, stretched to the plot; everything else is
placed in percent of it. Colours are CSS classes, so that one drawing serves the light and the dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from openelm.release.units import significant

Point = tuple[float, float]
UNIT = 1000  # coordinates of the nested SVG
THOUSANDS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
LOG_STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))


@dataclass(frozen=True)
class Scale:
    """One axis: its ends, its ticks, and whether equal distances mean equal ratios."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Return where `value` is on the axis, 0 at the low end and 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def exponent(self) -> int:
        """The power of ten that is taken out of the tick labels; 0 unless all values are small."""
        return 0 if self.log or self.high >= 0.01 else math.floor(math.log10(self.high))

    def label(self, tick: float) -> str:
        """Write a tick, without the power of ten of `exponent`."""
        value = tick / 10.0**self.exponent
        factor, suffix = next((pair for pair in THOUSANDS if self.high >= 10 * pair[0] and value), (1, ""))
        return f"{value / factor:,.6g}{suffix}"


def linear_scale(low: float, high: float, ticks: int = 5) -> Scale:
    """Return a linear axis that covers low..high and ends on ticks at 1, 2, 2.5 or 5 times a power of ten."""
    if not low < high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, last * step, tuple(round(i * step, 12) for i in range(first, last + 1)))


def log_scale(low: float, high: float, ticks: int = 6) -> Scale:
    """Return a logarithmic axis a little wider than low..high (both above 0) with at most about `ticks` ticks."""
    margin = max((high / low) ** 0.04, 1.02)
    low, high = low / margin, high * margin
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [
        [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        for steps in LOG_STEPS
    ]
    decades = choices[0][:: -(-len(choices[0]) // ticks)] if choices[0] else []
    chosen = max((choice for choice in (decades, *choices) if len(choice) <= ticks + 1), key=len)
    if len(chosen) < 3:  # less than a decade: equal steps read better
        chosen = [tick for tick in linear_scale(low, high, ticks).ticks if low <= tick <= high]
    return Scale(low, high, tuple(round(tick, 12) for tick in chosen), log=True)


def step_scale(low: int, high: int) -> Scale:
    """Return the axis of training steps: exactly low..high, with ticks at whole numbers."""
    high = max(high, low + 1)
    ticks = linear_scale(low, high).ticks
    return Scale(low, high, tuple(tick for tick in ticks if low <= tick <= high and tick == int(tick)))


@dataclass(frozen=True)
class Series:
    """A curve, or single points; `style` is its CSS class. The points are in order of x and finite."""

    name: str
    style: str
    points: tuple[Point, ...]
    dots: bool = False


@dataclass(frozen=True)
class Marker:
    """Something that happened at x; `kind` is its CSS class and names its icon, `place` counts those beside it."""

    x: float
    kind: str
    label: str
    place: int = 0


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    y: float
    label: str


def thin(points: Sequence[Point], limit: int = 600) -> tuple[Point, ...]:
    """Keep at most `limit` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= limit:
        return tuple(points)
    kept: list[Point] = []
    buckets = limit // 2
    for i in range(buckets):
        stretch = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return tuple(kept)


def percent(fraction: float) -> str:
    """Write a fraction of the plot as an SVG length."""
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"


def curve(points: Iterable[Point], x: Scale, y: Scale) -> str:
    """Return the `d` attribute of a path in the nested SVG; y grows upwards."""
    return "M" + "L".join(f"{UNIT * x.at(px):.1f} {UNIT * (1 - y.at(py)):.1f}" for px, py in points)


def line_chart(
    slug: str,
    description: str,
    series: Sequence[Series],
    x: Scale,
    y: Scale,
    *,
    height: int,
    markers: Sequence[Marker] = (),
    levels: Sequence[Level] = (),
) -> Markup:
    """Return the SVG of curves over a common x axis; the element with the id `{slug}-title` names it."""
    parts = [_grid(x, y)]
    for level in levels:
        at = percent(1 - y.at(level.y))
        parts.append(
            Markup(
                '<line class="level" x1="0" x2="100%" y1="{0}" y2="{0}"/>'
                '<text class="label" x="4" y="{0}" dy="-6">{1}</text>'
            ).format(at, level.label)
        )
    for marker in markers:
        parts.append(
            Markup(
                '<g class="event {1}"><title>{2}</title><line x1="{0}" x2="{0}" y1="0" y2="100%"/>'
                '<use href="#icon-{1}" x="{0}" y="-10" transform="translate({3})"/></g>'
            ).format(percent(x.at(marker.x)), marker.kind, marker.label, 11 * marker.place)
        )
    parts.append(_stretched(_path(one, x, y) for one in series if not one.dots and one.points))
    for one in series:
        if one.dots:
            parts += [
                Markup('<circle class="dot {}" cx="{}" cy="{}" r="3.5"/>').format(
                    one.style, percent(x.at(px)), percent(1 - y.at(py))
                )
                for px, py in one.points
            ]
    return Markup(
        '<svg class="plot" role="img" tabindex="0" height="{height}" aria-labelledby="{slug}-title" '
        'aria-describedby="{slug}-description" data-low="{low}" data-high="{high}">'
        '<desc id="{slug}-description">{description}</desc>{parts}'
        '<line class="cross" x1="0" x2="0" y1="0" y2="100%" visibility="hidden"/></svg>'
    ).format(height=height, slug=slug, low=x.low, high=x.high, description=description, parts=Markup("").join(parts))


def _grid(x: Scale, y: Scale) -> Markup:
    rows = [
        Markup(
            '<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>'
            '<text class="tick" x="-8" y="{0}" dy="0.32em" text-anchor="end">{1}</text>'
        ).format(percent(1 - y.at(tick)), y.label(tick))
        for tick in y.ticks
    ]
    columns = [Markup('<text class="tick" x="-14" y="100%" dy="1.6em" text-anchor="end">step</text>')]
    columns += [
        Markup('<text class="tick" x="{}" y="100%" dy="1.6em" text-anchor="middle">{}</text>').format(
            percent(x.at(tick)), x.label(tick)
        )
        for tick in x.ticks
    ]
    return Markup("").join([*rows, *columns])


def _path(series: Series, x: Scale, y: Scale) -> Markup:
    return Markup('<path class="line {}" d="{}"/>').format(series.style, curve(series.points, x, y))


def _stretched(paths: Iterable[Markup]) -> Markup:
    """Wrap paths in the nested SVG; CSS keeps their strokes from stretching."""
    return Markup(
        '<svg class="curves" viewBox="0 0 {0} {0}" preserveAspectRatio="none" width="100%" height="100%">{1}</svg>'
    ).format(UNIT, Markup("").join(paths))


def bar(value: float, top: float, style: str, interval: tuple[float, float] | None = None) -> Markup:
    """Return a horizontal bar from 0 to `value` on a scale that ends at `top`, with an interval if there is one."""
    parts = [Markup('<rect class="{}" width="{}" y="2" height="12"/>').format(style, percent(value / top))]
    if interval is not None:
        low, high = (percent(min(end / top, 1)) for end in interval)
        parts.append(Markup('<line class="interval" x1="{}" x2="{}" y1="8" y2="8"/>').format(low, high))
        parts += [
            Markup('<line class="interval" x1="{0}" x2="{0}" y1="4" y2="12"/>').format(end) for end in (low, high)
        ]
    return Markup('<svg class="bar" height="16" aria-hidden="true">{}</svg>').format(Markup("").join(parts))


@dataclass(frozen=True)
class Widths:
    """The widths of a model's layers, input first."""

    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn_dims: tuple[int, ...]


# The layer chart in percent of its width: layer numbers in the middle, attention to the left, FFN to the right.
CENTRE, GAP, WING = 50.0, 3.5, 36.0


def layer_chart(slug: str, description: str, model: Widths, uniform: Widths | None) -> Markup:
    """Return the SVG of a model seen from the side, output on top, with a uniform model as an outline."""
    layers = len(model.ffn_dims)
    row = 20 if layers <= 16 else 15
    compared = (model, uniform) if uniform else (model,)
    heads = WING / max(max(one.query_heads) for one in compared)
    ffn = WING / max(max(one.ffn_dims) for one in compared)
    tops = [(layers - 1 - index) * row for index in range(layers)]
    parts = [_bars(index, top, row, model, heads=heads, ffn=ffn) for index, top in enumerate(tops)]
    if uniform:
        left = [CENTRE - GAP - heads * value for value in uniform.query_heads]
        right = [CENTRE + GAP + ffn * value for value in uniform.ffn_dims]
        # Its own number of layers: a shallower or deeper uniform model gets a shorter or taller outline.
        tall = len(uniform.ffn_dims) / layers
        parts.append(_stretched(_outline(side, tall) for side in (left, right)))
    parts += [_values(index, top + row / 2, model, heads=heads, ffn=ffn) for index, top in enumerate(tops)]
    return Markup(
        '<svg class="layers" role="img" height="{height}" aria-labelledby="{slug}-title" '
        'aria-describedby="{slug}-description"><desc id="{slug}-description">{description}</desc>{parts}</svg>'
    ).format(height=layers * row, slug=slug, description=description, parts=Markup("").join(parts))


def _bars(index: int, top: int, row: int, model: Widths, *, heads: float, ffn: float) -> Markup:
    left, right = CENTRE - GAP, CENTRE + GAP
    bars = (
        ("queries", left - heads * model.query_heads[index], heads * model.query_heads[index]),
        ("keys", left - heads * model.kv_heads[index], heads * model.kv_heads[index]),
        ("ffn", right, ffn * model.ffn_dims[index]),
    )
    return Markup("").join(
        Markup('<rect class="{}" x="{:.2f}%" width="{:.2f}%" y="{}" height="{}"/>').format(
            style, x, width, top + 1, row - 2
        )
        for style, x, width in bars
    )


def _values(index: int, middle: float, model: Widths, *, heads: float, ffn: float) -> Markup:
    query, keys, hidden = model.query_heads[index], model.kv_heads[index], model.ffn_dims[index]
    left, right = CENTRE - GAP - heads * query - 1, CENTRE + GAP + ffn * hidden + 1
    texts = (
        ("tick", CENTRE, "middle", str(index + 1)),
        ("label", left, "end", f"{query} · {keys}"),
        ("label", right, "start", f"{hidden:,}"),
    )
    return Markup("").join(
        Markup('<text class="{}" x="{:.2f}%" y="{:g}" dy="0.34em" text-anchor="{}">{}</text>').format(
            style, x, middle, anchor, text
        )
        for style, x, anchor, text in texts
    )


def _outline(sides: Sequence[float], tall: float) -> Markup:
    """Return the stepped edge of a model, layer 1 at the bottom, in the nested SVG."""
    height = UNIT * tall / len(sides)
    steps = [f"V{UNIT - height * i:.1f}H{UNIT * side / 100:.1f}" for i, side in enumerate(sides)]
    return Markup('<path class="line uniform" d="M{:.1f} {}{}V{:.1f}"/>').format(
        UNIT * sides[0] / 100, UNIT, "".join(steps), UNIT - height * len(sides)
    )


def describe(series: Series, unit: str) -> str:
    """Say in a sentence where a curve starts and ends, for those who cannot see it."""
    first, last = series.points[0], series.points[-1]
    return (
        f"{series.name}: {significant(first[1])} {unit} at step {first[0]:,.0f}, "
        f"{significant(last[1])} {unit} at step {last[0]:,.0f}."
    )
