"""Small inline SVG charts: 360 units wide, so that they are read at their own size on a phone and tiled on a desk.

Colours are CSS classes (light, dark and print are the style sheet's business); every chart says its content in words
for those who cannot see it. All text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from edgedistill.report.wording import MINUS, clean, compact, shorten

WIDTH = 360
MAX_POINTS = 400


@dataclass(frozen=True)
class Unit:
    """How the numbers of an axis are written; ``scale`` turns the data's unit into the one that is shown."""

    scale: float = 1.0
    suffix: str = ""
    signed: bool = False

    def labels(self, ticks: Sequence[float]) -> list[str]:
        """One label per tick, all with the decimals that the distance between ticks needs."""
        step = abs(ticks[1] - ticks[0]) * self.scale
        power = -math.floor(math.log10(step) + 1e-9)
        decimals = max(0, power + (round(step * 10**power, 6) % 1 > 0))
        form = f"{'+' if self.signed else ''},.{decimals}f" if decimals <= 6 else ".1e"
        return ["0" + self.suffix if tick == 0 else self._write(tick, form) for tick in ticks]

    def value(self, number: float) -> str:
        """A single value, three significant digits."""
        return f"{compact(number * self.scale)}{self.suffix}"

    def _write(self, tick: float, form: str) -> str:
        return f"{tick * self.scale:{form}}".replace("-", MINUS) + self.suffix


PLAIN = Unit()
PERCENT = Unit(100, "%")
POINTS = Unit(100, "", signed=True)


@dataclass(frozen=True)
class Series:
    label: str
    color: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    dash: str = ""


@dataclass(frozen=True)
class Interval:
    """One row of a bar or interval chart: value with its low and high end, and the text printed at its right."""

    label: str
    color: str
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Point:
    """One dot of a scatter chart; ``label`` goes into the description of those who cannot see it."""

    x: float
    y: float
    color: str
    label: str = ""
    radius: float = 3.0


@dataclass(frozen=True)
class Box:
    """One row of a box chart: five percentiles, the middle ones the box and its median."""

    label: str
    color: str
    percentiles: tuple[float, float, float, float, float]


@dataclass(frozen=True)
class ReliabilityBin:
    """``confidence`` and ``accuracy`` are means over the bin's images; low and high bound the accuracy (95%)."""

    left: float
    right: float
    count: int
    confidence: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class _Axes:
    """Data to SVG units; the plotting area is the rectangle left..right, top..bottom."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float
    right: float
    top: float
    bottom: float

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 2)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 2)


def nice_ticks(low: float, high: float, target: int = 4) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``, about ``target`` steps of 1, 2, 2.5 or 5 x 10^k; 0 to 1
    where they are no numbers."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return nice_ticks(0.0, 1.0, target)
    span = high - low
    if span <= 0 or not math.isfinite(span):
        pad = abs(low) * 0.1 or 1.0
        return nice_ticks(low - pad, low + pad, target)
    power = 10.0 ** math.floor(math.log10(span / target))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * target >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    alt: str,
    x_label: str,
    unit: Unit = PLAIN,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines over a common x axis. Values that are not finite are left out; ``marks`` are labelled vertical lines."""
    drawn = [_thin(line) for line in series]
    ys = [y for line in drawn for y in line.y] or [0.0, 1.0]
    xs = [x for line in drawn for x in line.x] or [0.0, 1.0]
    y_ticks = nice_ticks(*(y_range or (min(ys), max(ys))))
    x_low, x_high = min(xs), max(xs)
    x_ticks = [tick for tick in nice_ticks(x_low, x_high, 5) if x_low <= tick <= x_high and _whole(tick, x_low, x_high)]
    axes = _Axes((x_low, x_high if x_high > x_low else x_low + 1), (y_ticks[0], y_ticks[-1]), 52, 350, 12, 168)
    parts = [_y_axis(axes, y_ticks, unit), _x_axis(axes, x_ticks, PLAIN, x_label)]
    for position, label in marks:
        at = axes.x(position)
        parts.append(f'<line class="mark" x1="{at}" x2="{at}" y1="{axes.top}" y2="{axes.bottom}"/>')
        parts.append(_text(at - 4, axes.top + 9, label, "small end"))
    for line in drawn:
        path = " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in zip(line.x, line.y, strict=True))
        dash = f' stroke-dasharray="{escape(line.dash)}"' if line.dash else ""
        if len(line.x) > 1:
            parts.append(f'<polyline class="line c-{line.color}" points="{path}"{dash}/>')
        if line.x:
            parts.append(
                f'<circle class="dot c-{line.color}" cx="{axes.x(line.x[-1])}" cy="{axes.y(line.y[-1])}" r="3"/>'
            )
    ends = [f"{line.label} ends at {unit.value(line.y[-1])}" for line in drawn if line.y][:8]
    return _svg(204, parts, "; ".join([alt, *ends]))


def scatter_chart(points: Sequence[Point], front: Series, *, alt: str, x_label: str, unit: Unit = PLAIN) -> Markup:
    """Dots of two measures and a line through some of them. Values that are not finite are left out."""
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    xs, ys = [point.x for point in shown] or [0.0, 1.0], [point.y for point in shown] or [0.0, 1.0]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs), 5), nice_ticks(min(ys), max(ys))
    axes = _Axes((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), 52, 350, 12, 212)
    parts = [_y_axis(axes, y_ticks, unit), _x_axis(axes, x_ticks, PLAIN, x_label)]
    line = _thin(front)
    if len(line.x) > 1:
        path = " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(f'<polyline class="line c-{line.color}" points="{path}"/>')
    for point in sorted(shown, key=lambda point: point.radius):
        parts.append(
            f'<circle class="dot c-{point.color}" cx="{axes.x(point.x)}" cy="{axes.y(point.y)}" r="{point.radius}"/>'
        )
    named = [f"{point.label}: {unit.value(point.y)} at {compact(point.x)}" for point in shown if point.label][:8]
    return _svg(248, parts, "; ".join([alt, *named]))


def size_chart(points: Sequence[Point], *, alt: str) -> Markup:
    """Height over width in pixels on two equal axes with the diagonal; larger dots below smaller ones."""
    ends = [value for point in points for value in (point.x, point.y)] or [0.0, 1.0]
    ticks = nice_ticks(0.0, max(ends)) if min(ends) < max(ends) / 2 else nice_ticks(min(ends), max(ends))
    span = (ticks[0], ticks[-1])
    axes = _Axes(span, span, 52, 350, 12, 212)
    parts = [_y_axis(axes, ticks, PLAIN), _x_axis(axes, ticks, PLAIN, "width, pixels (height upwards)")]
    parts.append(
        f'<line class="zero" x1="{axes.left}" y1="{axes.bottom}" x2="{axes.right}" y2="{axes.top}"/>'
    )  # square images
    for point in sorted(points, key=lambda point: -point.radius):
        place = f'cx="{axes.x(point.x)}" cy="{axes.y(point.y)}" r="{point.radius:.1f}"'
        parts.append(f'<circle class="dot sheer c-{point.color}" {place}/>')
    return _svg(248, parts, alt)


def box_chart(rows: Sequence[Box], *, alt: str, x_label: str) -> Markup:
    """A box with its median and a line to the outer percentiles per row, on one axis."""
    ends = [value for row in rows for value in row.percentiles] or [0.0, 1.0]
    ticks = nice_ticks(min(ends), max(ends))
    pitch, bottom = 30, 6 + 30 * len(rows)
    axes = _Axes((ticks[0], ticks[-1]), (0, 1), 12, 348, 4, bottom)
    parts = [_x_axis(axes, ticks, PLAIN, x_label, grid=True)]
    for index, row in enumerate(rows):
        mid = 23 + pitch * index
        low, first, middle, third, high = (axes.x(value) for value in row.percentiles)
        parts.append(_text(axes.left, 14 + pitch * index, shorten(row.label, 40), "halo"))
        parts.append(f'<line class="whisker c-{row.color}" x1="{low}" x2="{high}" y1="{mid}" y2="{mid}"/>')
        width = max(1.0, third - first)
        parts.append(
            f'<rect class="bar c-{row.color}" x="{first}" y="{mid - 5}" width="{width:.2f}" height="10" rx="2"/>'
        )
        parts.append(f'<line class="median" x1="{middle}" x2="{middle}" y1="{mid - 5}" y2="{mid + 5}"/>')
    words = [f"{row.label}: half between {row.percentiles[1]:g} and {row.percentiles[3]:g}" for row in rows]
    return _svg(bottom + 34, parts, f"{alt}. " + "; ".join(words))


def interval_chart(
    rows: Sequence[Interval], *, alt: str, unit: Unit = PLAIN, x_label: str, zero: bool = False
) -> Markup:
    """A dot with its interval per row, on one axis; ``zero`` draws the line that an interval must leave out. A row that is
    not finite has its text alone, here and in ``bar_chart``."""
    return _rows_chart(rows, alt=alt, unit=unit, x_label=x_label, bars=False, zero=zero)


def bar_chart(rows: Sequence[Interval], *, alt: str, unit: Unit = PLAIN, x_label: str) -> Markup:
    """A bar from zero to the value per row, with a whisker from low to high."""
    return _rows_chart(rows, alt=alt, unit=unit, x_label=x_label, bars=True, zero=False)


def _rows_chart(
    rows: Sequence[Interval], *, alt: str, unit: Unit = PLAIN, x_label: str, bars: bool, zero: bool
) -> Markup:
    known = [row for row in rows if all(map(math.isfinite, (row.value, row.low, row.high)))]
    low = min([0.0] * (zero or bars or not known) + [row.low for row in known])
    high = max([0.0] * (zero or not known) + [row.high for row in known])
    ticks = nice_ticks(low, high)
    pitch, bottom = 36, 6 + 36 * len(rows)
    axes = _Axes((ticks[0], ticks[-1]), (0, 1), 12, 348, 4, bottom)
    parts = [_x_axis(axes, ticks, unit, x_label, grid=True)]
    if zero:
        parts.append(f'<line class="zero" x1="{axes.x(0)}" x2="{axes.x(0)}" y1="{axes.top}" y2="{axes.bottom}"/>')
    for index, row in enumerate(rows):
        text_y, mid = 16 + pitch * index, 27 + pitch * index
        room = 54 - len(row.text)
        parts.append(_text(axes.left, text_y, shorten(row.label, max(12, room)), "halo"))
        parts.append(_text(axes.right, text_y, row.text, "end strong halo"))
        if row not in known:
            continue
        if bars:
            width = max(1.0, axes.x(row.value) - axes.x(0))
            parts.append(
                f'<rect class="bar c-{row.color}" x="{axes.x(0)}" y="{mid - 6}" width="{width:.2f}" height="12" rx="2"/>'
            )
        parts.append(_whisker(axes.x(row.low), axes.x(row.high), mid, "over" if bars else f"c-{row.color}"))
        if not bars:
            parts.append(f'<circle class="dot c-{row.color}" cx="{axes.x(row.value)}" cy="{mid}" r="4.5"/>')
    words = [f"{row.label}: {row.text}" for row in rows]
    return _svg(bottom + 34, parts, f"{alt}. " + "; ".join(words))


def reliability_chart(bins: Sequence[ReliabilityBin], *, alt: str, color: str) -> Markup:
    """Accuracy against confidence with 95% whiskers over the diagonal; below, how many images each bin holds."""
    axes = _Axes((0, 1), (0, 1), 52, 350, 12, 212)
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    parts = [_y_axis(axes, ticks, PERCENT)]
    parts.append(f'<line class="zero" x1="{axes.x(0)}" y1="{axes.y(0)}" x2="{axes.x(1)}" y2="{axes.y(1)}"/>')
    full = [item for item in bins if item.count]
    for item in full:
        at = axes.x(item.confidence)
        faint = " faint" if item.count < 10 else ""
        parts.append(
            f'<line class="whisker c-{color}{faint}" x1="{at}" x2="{at}" y1="{axes.y(item.low)}" y2="{axes.y(item.high)}"/>'
        )
        parts.append(f'<circle class="dot c-{color}{faint}" cx="{at}" cy="{axes.y(item.accuracy)}" r="4.5"/>')
    if len(full) > 1:
        path = " ".join(f"{axes.x(item.confidence)},{axes.y(item.accuracy)}" for item in full)
        parts.append(f'<polyline class="line thin c-{color}" points="{path}"/>')
    most = max([item.count for item in bins] or [1]) or 1
    histogram = _Axes((0, 1), (0, most), 52, 350, 226, 266)
    for item in full:
        top = histogram.y(item.count)
        width = histogram.x(item.right) - histogram.x(item.left) - 2
        parts.append(
            f'<rect class="bar c-{color}" x="{histogram.x(item.left) + 1}" y="{top}" width="{width:.2f}" '
            f'height="{max(1.0, histogram.bottom - top):.2f}"/>'
        )
    parts.append(_text(46, 236, f"{most:,}", "end"))
    parts.append(_text(46, 266, "images", "end small"))
    parts.append(_x_axis(histogram, ticks, PERCENT, "confidence"))
    words = [f"at {item.confidence:.0%} confidence {item.accuracy:.0%} right, {item.count:,} images" for item in full]
    return _svg(302, parts, f"{alt}. " + "; ".join(words))


def _thin(series: Series) -> Series:
    """Finite points only, at most MAX_POINTS of them, the last one kept."""
    pairs = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if len(pairs) > MAX_POINTS:
        step = -(-len(pairs) // MAX_POINTS)
        pairs = pairs[:-1][::step] + pairs[-1:]
    return Series(series.label, series.color, tuple(x for x, _ in pairs), tuple(y for _, y in pairs), series.dash)


def _whole(tick: float, low: float, high: float) -> bool:
    """Epochs and ranks have no fractions."""
    return tick == int(tick) or high - low < 1


def _whisker(x1: float, x2: float, y: float, css: str) -> str:
    ends = "".join(f'<line class="whisker {css}" x1="{x}" x2="{x}" y1="{y - 4}" y2="{y + 4}"/>' for x in (x1, x2))
    return f'<line class="whisker {css}" x1="{x1}" x2="{x2}" y1="{y}" y2="{y}"/>{ends}'


def _y_axis(axes: _Axes, ticks: Sequence[float], unit: Unit) -> str:
    parts = []
    for tick, label in zip(ticks, unit.labels(ticks), strict=True):
        at = axes.y(tick)
        parts.append(f'<line class="grid" x1="{axes.left}" x2="{axes.right}" y1="{at}" y2="{at}"/>')
        parts.append(_text(axes.left - 6, at + 4, label, "end"))
    return "".join(parts)


def _x_axis(axes: _Axes, ticks: Sequence[float], unit: Unit, title: str, *, grid: bool = False) -> str:
    parts = [f'<line class="axis" x1="{axes.left}" x2="{axes.right}" y1="{axes.bottom}" y2="{axes.bottom}"/>']
    for tick, label in zip(
        ticks, unit.labels(ticks) if len(ticks) > 1 else [f"{tick:g}" for tick in ticks], strict=True
    ):
        at = axes.x(tick)
        if grid:
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{axes.top}" y2="{axes.bottom}"/>')
        side = "start" if at < axes.left + 8 and grid else "end" if at > axes.right - 8 else "middle"
        parts.append(_text(at, axes.bottom + 15, label, side))
    parts.append(_text((axes.left + axes.right) / 2, axes.bottom + 30, title, "middle small"))
    return "".join(parts)


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x}" y="{y}">{escape(clean(text))}</text>'


def _svg(height: float, parts: Sequence[str], alt: str) -> Markup:
    label = escape(shorten(alt, 1000))
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
    return Markup(head + "".join(parts) + "</svg>")
