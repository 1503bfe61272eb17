"""A chart as a value, and as SVG: lines, bars, points and intervals over one pair of axes. Pure.

The same value becomes the SVG in the page, an SVG file and, through matplotlib, a PNG file (`afina.reports.figures`). Every chart has a title
and says in words what it draws; lines differ by dash as well as by colour. No more than `_MOST_POINTS` of a line are drawn: of each stretch its
least and its greatest value, so that no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["DASHES", "STROKES", "Bar", "Chart", "Point", "Range", "bounds", "svg", "thin", "ticks"]

Point = tuple[float, float]
#: Left edge, right edge, height.
Bar = tuple[float, float, float]
#: Name, low, value, high.
Range = tuple[str, float, float, float]

#: Colours of the lines in light and dark; each line has a dash pattern and a marker's label of its own too.
STROKES = ("var(--line-1)", "var(--line-2)", "var(--line-3)", "var(--line-4)", "var(--line-5)")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2")

_MOST_POINTS = 1200
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 700, 34, 250
_LEGENDS_PER_ROW, _LEGEND_WIDTH = 4, 160
_ROW = 22


@dataclass(frozen=True)
class Chart:
    """What to draw.

    Attributes:
        key: names the file and the ids in the page.
        lines: name -> points, x ascending.
        bars: name -> bars; drawn behind the lines.
        dots: points without a line.
        ranges: one row each, a value with its interval; then there is nothing else.
        marks: x -> label of a vertical line.
        whiskers: x, low, high.
        diagonal: draw y = x, where what is said and what is true agree.
        frame: x and y limits; by default what the data spans.
        said: what the chart shows, in words; by default the ends of its lines.
    """

    key: str
    title: str
    x: str = "step"
    y: str = ""
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    bars: Mapping[str, Sequence[Bar]] = field(default_factory=dict)
    dots: Sequence[Point] = ()
    ranges: Sequence[Range] = ()
    marks: Mapping[float, str] = field(default_factory=dict)
    whiskers: Sequence[tuple[float, float, float]] = ()
    diagonal: bool = False
    frame: tuple[tuple[float, float], tuple[float, float]] | None = None
    said: str = ""

    @property
    def drawn(self) -> dict[str, Sequence[Point]]:
        """The lines that have points."""
        return {name: points for name, points in self.lines.items() if points}

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.drawn or self.dots or self.ranges or any(self.bars.values()))

    @property
    def words(self) -> str:
        """What it shows, for who cannot see it."""
        if self.said:
            return self.said
        ends = [(name, points[0], points[-1]) for name, points in self.drawn.items()]
        said = [f"{name}: {a[1]:.4g} at {self.x} {a[0]:g}, {b[1]:.4g} at {self.x} {b[0]:g}" for name, a, b in ends]
        marks = [f"{label} began at {self.x} {at:g}" for at, label in self.marks.items()]
        return "; ".join([*said, *marks]) + "."


def bounds(chart: Chart) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits of the axes: x, y. Bars begin at 0; a flat line lies in the middle."""
    if chart.frame is not None:
        return chart.frame
    points = [p for line in chart.drawn.values() for p in line] + list(chart.dots)
    bars = [b for group in chart.bars.values() for b in group]
    xs = [x for x, _ in points] + [edge for b in bars for edge in b[:2]]
    ys = [y for _, y in points] + [0.0, *(b[2] for b in bars)] * bool(bars)
    low, high = min(ys), max(ys)
    if high == low:
        low, high = low - 0.5, high + 0.5
    first, last = min(xs), max(xs)
    return ((first, last) if last > first else (first - 0.5, last + 0.5)), (low, high)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in [low, high], about so many: 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    if not raw > 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + k) * step, 12) for k in range(count)]


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most about `most` points: the first, the last, and of each stretch between them the least and the greatest."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def svg(chart: Chart, *, style: str = "") -> str:
    """One SVG element; an empty string where there is nothing to draw.

    Args:
        style: CSS put inside, for a file that stands alone.
    """
    if not chart:
        return ""
    body, height = _ranges(chart) if chart.ranges else _plot(chart)
    name = escape(chart.key, quote=True)
    alone = f' xmlns="http://www.w3.org/2000/svg" width="720" height="{height}"' if style else ""
    return (
        f'<svg{alone} viewBox="0 0 720 {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(chart.title)}</title><desc id="{name}-desc">{escape(chart.words)}</desc>'
        f"{f'<style>{style}</style>' if style else ''}{body}</svg>"
    )


def _plot(chart: Chart) -> tuple[str, int]:
    """The drawing and its height."""
    (first, last), (low, high) = bounds(chart)
    named = [*chart.bars, *chart.drawn]
    legend_rows = math.ceil(len(named) / _LEGENDS_PER_ROW)
    top = _TOP + 20 * max(0, legend_rows - 1)
    bottom = _BOTTOM + top - _TOP

    def across(x: float) -> float:
        return _LEFT + (x - first) / (last - first) * (_RIGHT - _LEFT)

    def up(y: float) -> float:
        return bottom - (y - low) / (high - low) * (bottom - top)

    parts = []
    for value in ticks(low, high):
        y = up(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule)"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>'
        )
    for value in ticks(first, last, 8):
        parts.append(f'<text x="{across(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:.6g}</text>')
    parts.append(
        f'<text class="axis" x="{(_LEFT + _RIGHT) / 2}" y="{bottom + 38}" text-anchor="middle">{escape(chart.x)}</text>'
    )
    if chart.y:
        middle = (top + bottom) / 2
        parts.append(
            f'<text class="axis" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
            f"{escape(chart.y)}</text>"
        )
    if chart.diagonal:
        parts.append(
            f'<line x1="{across(max(first, low)):.1f}" y1="{up(max(first, low)):.1f}" x2="{across(min(last, high)):.1f}" '
            f'y2="{up(min(last, high)):.1f}" stroke="var(--soft)" stroke-dasharray="3 3"/>'
        )
    parts += _marks(chart, across, top, bottom)
    for number, (name, group) in enumerate(chart.bars.items()):
        stroke = STROKES[number % len(STROKES)]
        for left, right, value in group:
            x, width = across(left), max(1.0, across(right) - across(left) - 1)
            parts.append(
                f'<rect x="{x:.1f}" y="{up(value):.1f}" width="{width:.1f}" height="{max(0.0, up(0) - up(value)):.1f}" '
                f'fill="{stroke}" fill-opacity="{0.75 if number == 0 else 0.45}"/>'
            )
        parts.append(_legend(number, name, f'stroke="{stroke}" stroke-width="10"'))
    for x, y in chart.dots:
        parts.append(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5" fill="{STROKES[0]}" fill-opacity="0.5"/>')
    for x, least, greatest in chart.whiskers:
        parts.append(
            f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{up(least):.1f}" y2="{up(greatest):.1f}" '
            f'stroke="{STROKES[len(chart.bars) % len(STROKES)]}" stroke-width="1.5"/>'
        )
    for number, (name, points) in enumerate(chart.drawn.items(), start=len(chart.bars)):
        stroke, dash = STROKES[number % len(STROKES)], DASHES[number % len(DASHES)]
        style = f'fill="none" stroke="{stroke}" stroke-width="2" stroke-dasharray="{dash}"'
        placed = [(across(x), up(y)) for x, y in thin(points)]
        parts.append(f'<polyline {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
        if len(placed) <= 30:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{stroke}"/>' for x, y in placed]
        parts.append(_legend(number, name, style))
    return "".join(parts), bottom + 48


def _legend(number: int, name: str, style: str) -> str:
    row, column = divmod(number, _LEGENDS_PER_ROW)
    x, y = _LEFT + column * _LEGEND_WIDTH, 14 + 20 * row
    shown = name if len(name) <= 17 else name[:16] + "…"
    return (
        f'<line x1="{x}" x2="{x + 28}" y1="{y}" y2="{y}" {style}/><text x="{x + 34}" y="{y + 4}">{escape(shown)}</text>'
    )


def _marks(chart: Chart, across: object, top: int, bottom: int) -> list[str]:
    """Vertical lines; their labels only where they do not lie on each other."""
    assert callable(across)
    parts, free = [], -math.inf
    (first, last), _ = bounds(chart)
    for at, label in sorted(chart.marks.items()):
        if not first <= at <= last:
            continue
        x = across(at)
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="var(--soft)" stroke-dasharray="1 3"/>'
        )
        if x >= free:
            parts.append(
                f'<text class="mark" x="{x + 4:.1f}" y="{bottom - 6}" transform="rotate(-90 {x + 4:.1f} {bottom - 6}) translate(0 10)">'
                f"{escape(label)}</text>"
            )
            free = x + 16
    return parts


def _ranges(chart: Chart) -> tuple[str, int]:
    """Values with their intervals, one row each, as a dot and a bar."""
    longest = max(len(r[0]) for r in chart.ranges)
    left, right, top = 30 + 7 * min(34, max(6, longest)), 640, 26
    low, high = min(r[1] for r in chart.ranges), max(r[3] for r in chart.ranges)
    if high == low:
        low, high = low - 0.5, high + 0.5
    bottom = top + _ROW * len(chart.ranges)

    def across(x: float) -> float:
        return left + (x - low) / (high - low) * (right - left)

    parts = []
    for value in ticks(low, high):
        x = across(value)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="var(--rule)"/>'
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:.6g}</text>'
        )
    for number, (name, least, value, greatest) in enumerate(chart.ranges):
        y = top + _ROW * number + _ROW / 2
        shown = name if len(name) <= 34 else "…" + name[-33:]
        parts.append(
            f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>'
            f'<line x1="{across(least):.1f}" x2="{across(greatest):.1f}" y1="{y}" y2="{y}" stroke="{STROKES[0]}" stroke-width="2"/>'
            f'<circle cx="{across(value):.1f}" cy="{y}" r="4" fill="{STROKES[0]}"/>'
            f'<text x="{right + 12}" y="{y + 4}">{value:.4f}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(left + right) / 2}" y="{bottom + 36}" text-anchor="middle">{escape(chart.x)}</text>'
    )
    return "".join(parts), bottom + 46
