"""Charts as values: lines, bars, dots, intervals or a matrix, with a description in words. `afina.reports.drawing` draws them.

At most about `MOST_POINTS` points of a line are drawn: the least and the greatest value of each stretch, so that no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = [
    "Bar",
    "Chart",
    "Point",
    "Range",
    "points_of",
    "short_name",
    "smoothed",
    "thin",
]

Point = tuple[float, float]
#: Left edge, right edge, height.
Bar = tuple[float, float, float]
#: Name, low, value, high.
Range = tuple[str, float, float, float]

MOST_POINTS = 400
#: From so many points on a line is smoothed.
_SMOOTH_FROM = 60
_MOST_NAME = 48


@dataclass(frozen=True)
class Chart:
    """The content of a chart.

    Attributes:
        key: names the file, and the ids in the page.
        lines: name -> points, x ascending.
        faint: name of a line -> the values that it smooths.
        bars: name -> bars; drawn behind the lines.
        dots: name -> points without a line.
        ranges: one row each, a value with its interval; such a chart has nothing else but `marks`.
        matrix: counts, one row for each of `names`; such a chart has nothing else.
        marks: x -> label of a vertical line.
        best: the best point, with a label.
        whiskers: x, low, high.
        diagonal: draw y = x.
        frame: x and y limits; by default the range of the data.
        log: a logarithmic x axis.
        ticks: where the x axis has numbers; by default at round ones.
        description: the content in words; by default the ends of the lines.
        note: stands behind the title in the page.
    """

    key: str
    title: str
    x: str = "step"
    y: str = ""
    lines: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    faint: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    bars: Mapping[str, Sequence[Bar]] = field(default_factory=dict)
    dots: Mapping[str, Sequence[Point]] = field(default_factory=dict)
    ranges: Sequence[Range] = ()
    matrix: Sequence[Sequence[int]] = ()
    names: Sequence[str] = ()
    marks: Mapping[float, str] = field(default_factory=dict)
    best: tuple[float, float, str] | None = None
    whiskers: Sequence[tuple[float, float, float]] = ()
    diagonal: bool = False
    frame: tuple[Point, Point] | None = None
    log: bool = False
    ticks: Sequence[float] = ()
    description: str = ""
    note: str = ""

    @property
    def drawn(self) -> dict[str, Sequence[Point]]:
        """The lines that have points."""
        return {name: points for name, points in self.lines.items() if points}

    def __bool__(self) -> bool:
        """True if there is anything to draw."""
        return bool(self.drawn or self.ranges or self.matrix or any(self.dots.values()) or any(self.bars.values()))

    @property
    def in_words(self) -> str:
        """The description for readers who cannot see the chart."""
        ends = [(name, points[0], points[-1]) for name, points in self.drawn.items()]
        lines = [f"{name}: {a[1]:.4g} at {self.x} {a[0]:g}, {b[1]:.4g} at {self.x} {b[0]:g}" for name, a, b in ends]
        marks = [f"{label} at {self.x} {at:g}" for at, label in self.marks.items()]
        words = [self.description.rstrip(".")] if self.description else lines
        return "; ".join([*words, *marks, *([self.best[2]] if self.best else [])]) + "."

    @property
    def caption(self) -> str:
        """Title, note, and how many points were left out."""
        lines = (*self.drawn.values(), *self.faint.values())
        whole, kept = sum(map(len, lines)), sum(len(thin(points)) for points in lines)
        left_out = f"{kept:,} of {whole:,} points are drawn: the least and the greatest of each stretch."
        return " ".join(filter(None, [f"{self.title}.", self.note, left_out if kept < whole else ""]))


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points: the first, the last, and the least and the greatest of each stretch between them."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def smoothed(chart: Chart, *names: str) -> Chart:
    """The chart with lines of many points smoothed: an exponential moving average, its first values corrected for their small number.

    The values themselves stay as a pale line where it is one line.
    """
    long = {name: chart.lines[name] for name in names if len(chart.lines[name]) >= _SMOOTH_FROM}
    if not long:
        return chart
    spans = {name: max(10, len(points) // 25) for name, points in long.items()}
    lines = {name: _moving_average(points, spans[name]) for name, points in long.items()}
    note = f"Moving averages over about {max(spans.values())} values."
    if len(names) == 1:
        note = f"Strong line: moving average over about {spans[names[0]]} values of {names[0]}; pale: the values themselves."
    note = f"{chart.note} {note}".lstrip()
    return replace(chart, lines={**chart.lines, **lines}, faint=long if len(names) == 1 else {}, note=note)


def _moving_average(points: Sequence[Point], span: int) -> list[Point]:
    average, weight, keep, line = 0.0, 0.0, 1 - 2 / (span + 1), []
    for x, y in points:
        average, weight = keep * average + (1 - keep) * y, keep * weight + 1 - keep
        line.append((x, average / weight))
    return line


def points_of(lines: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """The finite values of a key of `metrics.jsonl` by step."""
    points = ((line.get("step"), line.get(key)) for line in lines)
    return [
        (float(x), float(y))
        for x, y in points
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y)
    ]


def short_name(name: str, most: int = _MOST_NAME) -> str:
    """The end of a long name: names of runs differ there."""
    return name if len(name) <= most else "…" + name[1 - most :]
