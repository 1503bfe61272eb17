"""Charts drawn by matplotlib once, as SVG for page and file and as PNG.

In the page the colours become the page's own (light, dark, print), and `page.js` adds values under the pointer and zoom; it reads both
from the drawing. matplotlib is imported inside the functions and needs no display.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from afina.files import write_atomic
from afina.reports.charts import Chart, Point, short_name, thin

__all__ = ["LIGHT", "inline_svg", "write_figures"]

#: The page's variable of each colour, and its value in files and on paper.
LIGHT = {
    "text": "#1c2024",
    "soft": "#56606a",
    "rule": "#d5dade",
    "line-1": "#1a5dab",
    "line-2": "#b3470b",
    "line-3": "#2a7a3b",
    "line-4": "#8a3c9c",
    "line-5": "#6a5a00",
    "line-6": "#00707a",
}
_COLOURS = [colour for name, colour in LIGHT.items() if name.startswith("line")]
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)), (0, (8, 2)))
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": LIGHT["text"],
    "text.parse_math": False,
    "axes.labelcolor": LIGHT["soft"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": False,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["text"],
    "ytick.labelcolor": LIGHT["text"],
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "path.simplify": False,
    "svg.fonttype": "none",
}
_WIDTH, _HEIGHT, _DPI = 4.8, 2.5, 200
#: A legend's row, a row of a chart of intervals and the side of a matrix's cell, in inches.
_LEGEND_ROW, _ROW, _CELL = 0.18, 0.22, 0.27


def _figure(chart: Chart) -> tuple[Any, Any]:
    """A figure and its axes."""
    from matplotlib.figure import Figure

    if chart.matrix:
        side = max(2.0, _CELL * len(chart.names))
        size = side + 1.2 + 0.07 * max(len(short_name(name)) for name in chart.names)
        figure = Figure(figsize=(size, size), layout="constrained")
    else:
        legends = len(chart.bars) + len(chart.drawn) + len(chart.dots) + bool(chart.best)
        rows = math.ceil(legends / _legends_per_row(chart)) if legends > 1 else 0
        height = 0.85 + _ROW * len(chart.ranges) if chart.ranges else _HEIGHT + _LEGEND_ROW * max(0, rows - 1)
        longest = max((len(short_name(name)) for name, *_ in chart.ranges), default=0)
        figure = Figure(figsize=(_WIDTH + 0.055 * max(0, longest - 20), height), layout="constrained")
    axes = figure.add_subplot()
    (_draw_matrix if chart.matrix else _draw_ranges if chart.ranges else _draw)(chart, axes)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    return figure, axes


def _is_legend_needed(chart: Chart) -> bool:
    """A single line needs one where the title does not name it."""
    return any(name.lower() not in chart.title.lower() for name in chart.drawn)


def _legends_per_row(chart: Chart) -> int:
    best = [chart.best[2]] if chart.best else []
    longest = max(map(len, (*chart.bars, *chart.drawn, *chart.dots, *best)), default=0)
    return 3 if longest <= 14 else 2 if longest <= 26 else 1


def _draw(chart: Chart, axes: Any) -> None:
    shown: list[Any] = []
    for number, (name, bars) in enumerate(chart.bars.items()):
        edges = [(left, right - left, value) for left, right, value in bars]
        left, width, heights = zip(*edges, strict=True) if edges else ((), (), ())
        # The outline of a pale bar is as strong as a line.
        filled = {
            "facecolor": (_COLOURS[number], 0.7 - 0.3 * (number > 0)),
            "edgecolor": _COLOURS[number],
            "linewidth": 0.6,
        }
        drawn = axes.bar(left, heights, width, align="edge", label=name, **filled)
        for at, bar in enumerate(drawn):
            bar.set_gid(f"{chart.key}-b{number}.{at}")
        shown.append(drawn)
    for number, (name, points) in enumerate(chart.dots.items(), start=len(chart.bars)):
        alpha = 0.9 if len(points) < 200 else 0.65  # a single dot has 3 : 1 against the page
        drawn = axes.scatter(
            *_columns(points), s=14, color=_COLOURS[number % len(_COLOURS)], alpha=alpha, linewidths=0, label=name
        )
        drawn.set_gid(f"{chart.key}-d{number}")
        shown.append(drawn)
    first = len(chart.bars) + len(chart.dots)
    for number, (name, points) in enumerate(chart.drawn.items(), start=first):
        colour, dash = _COLOURS[number % len(_COLOURS)], _DASHES[(number + number // len(_COLOURS)) % len(_DASHES)]
        if chart.faint.get(name):
            axes.plot(
                *_columns(thin(chart.faint[name])), color=colour, alpha=0.3, linewidth=0.8, gid=f"{chart.key}-f{number}"
            )
        few = {"marker": "o", "markersize": 3.5} if len(points) <= 40 else {}
        line = {"color": colour, "linestyle": dash, "linewidth": 1.5, "label": name, "gid": f"{chart.key}-d{number}"}
        shown += axes.plot(*_columns(thin(points)), **line, **few)
    for number, (x, low, high) in enumerate(chart.whiskers):
        axes.plot([x, x], [low, high], color=LIGHT["text"], linewidth=1.2, gid=f"{chart.key}-w{number}")
    if chart.diagonal:
        axes.axline((0, 0), slope=1, color=LIGHT["soft"], linestyle=(0, (3, 3)), linewidth=0.8)
    if chart.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
    if chart.x == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.ticks:
        axes.set_xticks(chart.ticks)
    if chart.frame is not None:
        axes.set_xlim(*chart.frame[0])
        axes.set_ylim(*chart.frame[1])
    _draw_marks(chart, axes)
    if chart.best is not None:
        x, y, label = chart.best
        axes.plot([x], [y], marker="D", markersize=6, color=LIGHT["text"], linestyle="none", gid=f"{chart.key}-o0")
        shown += [axes.lines[-1]]
        axes.lines[-1].set_label(label)
    if len(shown) > 1 or _is_legend_needed(chart):
        per_row = _legends_per_row(chart)
        names = [short_name(str(one.get_label()), 52 // per_row) for one in shown]
        axes.figure.legend(shown, names, loc="outside upper left", ncols=per_row, fontsize=8.5)


def _draw_marks(chart: Chart, axes: Any, *, above: bool = False) -> None:
    """Vertical lines with their labels, along the line or above it; the labels of the first few, so that they do not cover each other."""
    low, high = axes.get_xlim()
    for number, (at, label) in enumerate(sorted(chart.marks.items())):
        if low <= at <= high:
            style = {"color": LIGHT["soft"], "linestyle": (0, (1, 2)), "linewidth": 1, "gid": f"{chart.key}-m{number}"}
            axes.axvline(at, **style)
            if number < 6:
                place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "color": LIGHT["soft"], "fontsize": 8}
                if above:
                    if label not in list(chart.marks.values())[:number]:
                        axes.annotate(label, (at, 1), ha="center", va="bottom", **place)
                    continue
                beside = {"xytext": (2, 3), "textcoords": "offset points", "rotation": 90}
                axes.annotate(label, (at, 0), **beside, **place).set_in_layout(False)


def _draw_ranges(chart: Chart, axes: Any) -> None:
    names, low, value, high = zip(*chart.ranges, strict=True)
    rows = range(len(names))
    axes.hlines(rows, low, high, color=_COLOURS[0], linewidth=1.8)
    axes.plot(value, rows, "o", color=_COLOURS[0], markersize=5)
    axes.set_yticks(rows, [short_name(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False, axis="y")
    if chart.marks:
        axes.plot(list(chart.marks), [0] * len(chart.marks), alpha=0)  # inside the limits
    _draw_marks(chart, axes, above=True)


def _draw_matrix(chart: Chart, axes: Any) -> None:
    """Counts in squares; the darker, the larger the share of the row. Of many labels, counts of 2 % of a row or more."""
    from matplotlib.colors import LinearSegmentedColormap

    names = [short_name(name) for name in chart.names]
    shares = [[count / (sum(row) or 1) for count in row] for row in chart.matrix]
    axes.imshow(shares, cmap=LinearSegmentedColormap.from_list("shares", ["#ffffff", _COLOURS[0]]), vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    axes.grid(False)
    least = 0.0 if len(names) <= 12 else 0.02 if len(names) <= 30 else 1.0
    for i, row in enumerate(chart.matrix):
        for j, count in enumerate(row):
            if count and shares[i][j] >= least:
                colour = "#ffffff" if shares[i][j] > 0.5 else LIGHT["text"]
                size = 9 if len(str(count)) < 4 else 27 / len(str(count))
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=size)


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# -- SVG and PNG -------------------------------------------------------------------------------------------------------


def _rendered(chart: Chart, png: bool) -> tuple[str, bytes]:
    """The SVG element with its colours as hexadecimal numbers, and the PNG."""
    from matplotlib import rc_context

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a home directory that cannot be written, a missing font
    image, drawing = io.BytesIO(), io.StringIO()
    with warnings.catch_warnings(), rc_context({**_STYLE, "svg.hashsalt": chart.key}):
        # A script that matplotlib's own font lacks: a box is drawn in the PNG; the SVG beside it is right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure, axes = _figure(chart)
        figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        if png:
            figure.savefig(image, format="png", dpi=_DPI, metadata={"Software": None})
        about = _readable(chart, figure, axes)
    return _cleaned(drawing.getvalue(), chart, about), image.getvalue()


def _readable(chart: Chart, figure: Any, axes: Any) -> str:
    """Attributes for `page.js`: the plot's box in the drawing, the limits of its axes, the names of its lines and dots."""
    if chart.matrix or chart.ranges:
        return ""
    height = figure.get_figheight() * 72
    box = axes.get_position()
    wide = figure.get_figwidth() * 72
    corners = [box.x0 * wide, height - box.y1 * height, box.x1 * wide, height - box.y0 * height]
    names = [*chart.bars, *chart.dots, *chart.drawn]
    values = {
        "box": " ".join(f"{v:.2f}" for v in corners),
        "limits": " ".join(f"{v:.9g}" for v in (*axes.get_xlim(), *axes.get_ylim())),
        "scale": "log" if chart.log else "linear",
        "x": chart.x,
        "names": json.dumps(names, ensure_ascii=False),
    }
    return "".join(f' data-{key}="{escape(value, quote=True)}"' for key, value in values.items())


def _cleaned(drawing: str, chart: Chart, about: str) -> str:
    """matplotlib's SVG as one element that can stand in a page: named, described, without ids that others have too."""
    body = drawing[drawing.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r'<g id="([xy])tick_\d+">', r'<g class="tick-\1">', body)
    kept = (*used, f"{chart.key}-")
    body = re.sub(r' id="([^"]+)"', lambda at: at[0] if at[1].startswith(kept) else "", body)
    body = re.sub(
        r'(?<= [dxy]=")[^"]+', lambda at: re.sub(r"-?\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", at[0]), body
    )
    body = re.sub(r"font: ([\d.]+px)[^;\"]+", r"font: \1 system-ui, sans-serif", body)
    body = re.sub(r">\s+<", "><", body)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    assert size is not None
    name = escape(chart.key, quote=True)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{size[0][9:-1]}" '
        f'width="{size[1]}" height="{size[2]}" stroke-linejoin="round" role="img" aria-labelledby="{name}-title {name}-desc"{about}>'
        f'<title id="{name}-title">{escape(chart.title)}</title><desc id="{name}-desc">{escape(chart.in_words)}</desc>'
    )
    return head + body[body.index(">") + 1 :].strip()


def inline_svg(drawing: str) -> str:
    """The drawing in the colours of the page around it."""
    for name, colour in LIGHT.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    return drawing.replace(' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1)


def write_figures(folder: Path, charts: Iterable[Chart], *, png: bool = False) -> dict[str, str]:
    """Write `<key>.svg`, and with `png` `<key>.png`, of every chart that has something to draw; returns the drawings by key.

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    drawings = {}
    for chart in filter(None, charts):
        drawings[chart.key], image = _rendered(chart, png)
        alone = drawings[chart.key].replace("<svg ", '<svg style="background: #fff" ', 1)
        write_atomic(folder / f"{chart.key}.svg", f'<?xml version="1.0" encoding="UTF-8"?>\n{alone}\n')
        if png:
            write_atomic(folder / f"{chart.key}.png", image)
    return drawings
