"""A chart as a value, and its SVG: lines, bars, points, intervals or a matrix. Pure.

The same SVG stands in the page and in a file, and a PNG file is made of it (`afina.reports.figures`). Every chart has a title and a
description in words; lines differ by dash as well as by colour. At most about `_MOST_POINTS` points of a line are drawn: the least and
the greatest value of each stretch, so that no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Bar", "Chart", "Point", "Range", "svg", "thin", "ticks"]

Point = tuple[float, float]
#: Left edge, right edge, height.
Bar = tuple[float, float, float]
#: Name, low, value, high.
Range = tuple[str, float, float, float]

#: Colour and dash pattern of each line; the page defines the colours for light and dark.
_STROKES = ("var(--line-1)", "var(--line-2)", "var(--line-3)", "var(--line-4)", "var(--line-5)")
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2")
_SOFT, _RULE = "var(--soft)", "var(--rule)"

_MOST_POINTS = 1200
_WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 700, 34, 250
_LEGENDS_PER_ROW, _LEGEND_WIDTH = 4, 160
#: Height of a row of a chart of intervals; the longest name that is shown; the most labels of a matrix that shows its numbers.
_ROW, _NAME, _MOST_NUMBERS = 22, 34, 30


@dataclass(frozen=True)
class Chart:
    """The content of a chart.

    Attributes:
        key: names the file, and the ids in the page.
        lines: name -> points, x ascending.
        bars: name -> bars; drawn behind the lines.
        dots: points without a line.
        ranges: one row each, a value with its interval; such a chart has nothing else.
        matrix: counts, one row for each of `names`; such a chart has nothing else.
        marks: x -> label of a vertical line.
        whiskers: x, low, high.
        diagonal: draw y = x.
        frame: x and y limits; by default the range of the data.
        description: the content in words; by default the ends of the lines.
    """

    key: str
    title: str
    x: str = "step"
    y: str = ""
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    bars: Mapping[str, Sequence[Bar]] = field(default_factory=dict)
    dots: Sequence[Point] = ()
    ranges: Sequence[Range] = ()
    matrix: Sequence[Sequence[int]] = ()
    names: Sequence[str] = ()
    marks: Mapping[float, str] = field(default_factory=dict)
    whiskers: Sequence[tuple[float, float, float]] = ()
    diagonal: bool = False
    frame: tuple[Point, Point] | None = None
    description: str = ""

    @property
    def drawn(self) -> dict[str, Sequence[Point]]:
        """The lines that have points."""
        return {name: points for name, points in self.lines.items() if points}

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.drawn or self.dots or self.ranges or self.matrix or any(self.bars.values()))

    @property
    def in_words(self) -> str:
        """The description for readers who cannot see the chart."""
        if self.description:
            return self.description
        ends = [(name, points[0], points[-1]) for name, points in self.drawn.items()]
        lines = [f"{name}: {a[1]:.4g} at {self.x} {a[0]:g}, {b[1]:.4g} at {self.x} {b[0]:g}" for name, a, b in ends]
        marks = [f"{label} began at {self.x} {at:g}" for at, label in self.marks.items()]
        return "; ".join([*lines, *marks]) + "."


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About `about` round numbers in [low, high]: 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    if not raw > 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + k) * step, 12) for k in range(count)]


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most about `most` points: the first, the last, and the least and the greatest of each stretch between them."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def svg(chart: Chart, *, style: str = "") -> str:
    """One SVG element; an empty string if there is nothing to draw.

    Args:
        style: CSS put inside, for a file that stands alone.
    """
    if not chart:
        return ""
    draw = _matrix if chart.matrix else _ranges if chart.ranges else _plot
    body, width, height = draw(chart)
    name = escape(chart.key, quote=True)
    alone = f' xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"' if style else ""
    return (
        f'<svg{alone} viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(chart.title)}</title><desc id="{name}-desc">{escape(chart.in_words)}</desc>'
        f"{f'<style>{style}</style>' if style else ''}{body}</svg>"
    )


def _line(start: Point, end: Point, stroke: str, more: str = "") -> str:
    return (
        f'<line x1="{start[0]:.1f}" x2="{end[0]:.1f}" y1="{start[1]:.1f}" y2="{end[1]:.1f}" stroke="{stroke}"{more}/>'
    )


def _dot(x: float, y: float, radius: float, more: str = "", stroke: str = _STROKES[0]) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{stroke}"{more}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", *, kind: str = "", upwards: bool = False) -> str:
    """Text at its baseline. `kind`: a class of the page's style."""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if upwards else ""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'


def _short(name: str, most: int = _NAME) -> str:
    """The end of a long name: names of runs differ there."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map from [low, high] to [start, end]."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _widened(low: float, high: float) -> Point:
    """Limits of an axis: a single value lies in the middle."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _bounds(chart: Chart) -> tuple[Point, Point]:
    """Limits of the axes: x, y. Bars begin at 0."""
    if chart.frame is not None:
        return chart.frame
    points = [p for line in chart.drawn.values() for p in line] + list(chart.dots)
    bars = [b for group in chart.bars.values() for b in group]
    xs = [x for x, _ in points] + [edge for b in bars for edge in b[:2]]
    ys = [y for _, y in points] + [0.0, *(b[2] for b in bars)] * bool(bars)
    return _widened(min(xs), max(xs)), _widened(min(ys), max(ys))


def _plot(chart: Chart) -> tuple[str, int, int]:
    """The drawing over a pair of axes, its width and height."""
    (first, last), (low, high) = _bounds(chart)
    legend_rows = math.ceil((len(chart.bars) + len(chart.drawn)) / _LEGENDS_PER_ROW)
    top = _TOP + 20 * max(0, legend_rows - 1)
    bottom = _BOTTOM + top - _TOP
    across, up = _scale(first, last, _LEFT, _RIGHT), _scale(low, high, bottom, top)
    parts = []
    for value in ticks(low, high):
        parts.append(_line((_LEFT, up(value)), (_RIGHT, up(value)), _RULE))
        parts.append(_text(_LEFT - 8, up(value) + 4, f"{value:.6g}", "end"))
    parts += [_text(across(value), bottom + 18, f"{value:.6g}", "middle") for value in ticks(first, last, 8)]
    parts.append(_text((_LEFT + _RIGHT) / 2, bottom + 38, chart.x, "middle", kind="axis"))
    if chart.y:
        parts.append(_text(14, (top + bottom) / 2, chart.y, "middle", kind="axis", upwards=True))
    if chart.diagonal:
        start, end = max(first, low), min(last, high)
        parts.append(_line((across(start), up(start)), (across(end), up(end)), _SOFT, ' stroke-dasharray="3 3"'))
    parts += _marks(chart, across, top, bottom)
    for number, (name, group) in enumerate(chart.bars.items()):
        stroke = _STROKES[number % len(_STROKES)]
        for left, right, value in group:
            x, width = across(left), max(1.0, across(right) - across(left) - 1)
            parts.append(
                f'<rect x="{x:.1f}" y="{up(value):.1f}" width="{width:.1f}" height="{max(0.0, up(0) - up(value)):.1f}" '
                f'fill="{stroke}" fill-opacity="{0.75 if number == 0 else 0.45}"/>'
            )
        parts.append(_legend(number, name, f'stroke="{stroke}" stroke-width="10"'))
    parts += [_dot(across(x), up(y), 2.5, ' fill-opacity="0.5"') for x, y in chart.dots]
    for x, least, greatest in chart.whiskers:
        stroke = _STROKES[len(chart.bars) % len(_STROKES)]
        parts.append(_line((across(x), up(least)), (across(x), up(greatest)), stroke, ' stroke-width="1.5"'))
    for number, (name, points) in enumerate(chart.drawn.items(), start=len(chart.bars)):
        stroke, dash = _STROKES[number % len(_STROKES)], _DASHES[number % len(_DASHES)]
        style = f'fill="none" stroke="{stroke}" stroke-width="2" stroke-dasharray="{dash}"'
        placed = [(across(x), up(y)) for x, y in thin(points)]
        parts.append(f'<polyline {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
        if len(placed) <= 30:
            parts += [_dot(x, y, 3, stroke=stroke) for x, y in placed]
        parts.append(_legend(number, name, style))
    return "".join(parts), _WIDTH, bottom + 48


def _legend(number: int, name: str, style: str) -> str:
    row, column = divmod(number, _LEGENDS_PER_ROW)
    x, y = _LEFT + column * _LEGEND_WIDTH, 14 + 20 * row
    shown = name if len(name) <= 17 else name[:16] + "…"
    return f'<line x1="{x}" x2="{x + 28}" y1="{y}" y2="{y}" {style}/>{_text(x + 34, y + 4, shown)}'


def _marks(chart: Chart, across: Callable[[float], float], top: int, bottom: int) -> list[str]:
    """Vertical lines, with those labels that do not cover each other."""
    parts, free = [], -math.inf
    (first, last), _ = _bounds(chart)
    for at, label in sorted(chart.marks.items()):
        if not first <= at <= last:
            continue
        x = across(at)
        parts.append(_line((x, top), (x, bottom), _SOFT, ' class="mark" stroke-dasharray="1 3"'))
        if x >= free:
            parts.append(_text(x + 14, bottom - 6, label, kind="mark", upwards=True))
            free = x + 16
    return parts


def _ranges(chart: Chart) -> tuple[str, int, int]:
    """Values with their intervals, one row each, as a dot and a bar."""
    left, right, top = 30 + 7 * min(_NAME, max(6, *(len(r[0]) for r in chart.ranges))), 640, 26
    low, high = _widened(min(r[1] for r in chart.ranges), max(r[3] for r in chart.ranges))
    bottom = top + _ROW * len(chart.ranges)
    across = _scale(low, high, left, right)
    parts = []
    for value in ticks(low, high):
        parts.append(_line((across(value), top), (across(value), bottom), _RULE))
        parts.append(_text(across(value), bottom + 16, f"{value:.6g}", "middle"))
    for number, (name, least, value, greatest) in enumerate(chart.ranges):
        y = top + _ROW * number + _ROW / 2
        parts.append(_text(left - 12, y + 4, _short(name), "end"))
        parts.append(_line((across(least), y), (across(greatest), y), _STROKES[0], ' stroke-width="2"'))
        parts.append(_dot(across(value), y, 4))
        parts.append(_text(right + 12, y + 4, f"{value:.4f}"))
    parts.append(_text((left + right) / 2, bottom + 36, chart.x, "middle", kind="axis"))
    return "".join(parts), _WIDTH, bottom + 46


def _matrix(chart: Chart) -> tuple[str, int, int]:
    """Counts in squares; the darker, the larger the share of the row."""
    names = [_short(name) for name in chart.names]
    shown = len(names) <= _MOST_NUMBERS
    side = max(30, 8 + 8 * len(str(max(map(max, chart.matrix))))) if shown else 14
    margin = 12 + 8 * max(map(len, names))
    left, top = margin + 20, margin + 20
    width, height = left + side * len(names) + 10, top + side * len(names) + 10
    parts = [
        _text((left + width) / 2, 14, chart.x, "middle", kind="axis"),
        _text(14, (top + height) / 2, chart.y, "middle", kind="axis", upwards=True),
    ]
    for i, (name, row) in enumerate(zip(names, chart.matrix, strict=True)):
        middle, total = i * side + side / 2 + 4, sum(row) or 1
        parts.append(_text(left - 8, top + middle, name, "end"))
        parts.append(_text(left + middle, top - 8, name, upwards=True))
        for j, count in enumerate(row):
            x, y = left + j * side, top + i * side
            parts.append(
                f'<rect x="{x}" y="{y}" width="{side - 1}" height="{side - 1}" fill="{_STROKES[0]}" '
                f'fill-opacity="{0.03 + 0.57 * count / total:.3f}"/>'
            )
            if shown:
                parts.append(_text(x + side / 2, y + side / 2 + 4, str(count), "middle"))
    return "".join(parts), width, height
