"""Charts as files: SVG always, PNG where matplotlib is installed and asked for. Writes into a folder; leaves other files alone.

Text in SVG stays text, in the reader's own fonts. matplotlib is imported inside the function, with a backend that needs no display.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from afina.files import write_atomic
from afina.reports.charts import Chart, bounds, svg, thin
from afina.reports.page import FIGURE_STYLE
from afina.statistics.predictions import need

__all__ = ["Matrix", "png_bytes", "write_figures"]

#: The light colours of the page, and dashes as matplotlib names them.
_COLOURS = ("#1a5dab", "#b3470b", "#2a7a3b", "#8a3c9c", "#6a5a00")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 3)), (0, (1, 2)), (0, (6, 2, 1, 2)), (0, (3, 2)))
_SOFT = "#56606a"
_DPI = 160

#: A confusion matrix: key, title, counts (truth × prediction), label names.
Matrix = tuple[str, str, Sequence[Sequence[int]], Sequence[str]]


def write_figures(
    folder: Path, charts: Iterable[Chart], matrices: Iterable[Matrix] = (), *, png: bool = False
) -> list[Path]:
    """Write `<key>.svg`, and with `png` `<key>.png`, of every chart that has something to draw; matrices as PNG only.

    Raises:
        EnvironmentProblem: PNG files were asked for and matplotlib is not installed, or the folder cannot be written.
    """
    if png:
        need("PNG files", "matplotlib")
    written = []
    for chart in charts:
        if not chart:
            continue
        head = '<?xml version="1.0" encoding="UTF-8"?>\n'
        contents: dict[str, str | bytes] = {"svg": head + svg(chart, style=FIGURE_STYLE) + "\n"}
        if png:
            contents["png"] = png_bytes(chart)
        for suffix, content in contents.items():
            written.append(folder / f"{chart.key}.{suffix}")
            write_atomic(written[-1], content)
    for key, title, counts, labels in matrices if png else ():
        written.append(folder / f"{key}.png")
        write_atomic(written[-1], _matrix_bytes(title, counts, labels))
    return written


def png_bytes(chart: Chart) -> bytes:
    """The chart as a PNG file, drawn by matplotlib."""
    from matplotlib.figure import Figure

    rows = len(chart.ranges)
    figure = Figure(figsize=(7.2, 3.2 if not rows else 0.9 + 0.24 * rows), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_plain(chart.title), fontsize=11)
    axes.set_xlabel(_plain(chart.x))
    axes.set_ylabel(_plain(chart.y))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if rows:
        names, low, value, high = zip(*chart.ranges, strict=True)
        places = list(range(rows))[::-1]
        spread = [[v - a for v, a in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]]
        axes.errorbar(value, places, xerr=spread, fmt="o", color=_COLOURS[0], markersize=4)
        axes.set_yticks(places, [_plain(name) for name in names], fontsize=8)
        axes.set_ylim(-0.6, rows - 0.4)
        axes.grid(axis="x", alpha=0.3)
    else:
        _draw(axes, chart)
    return _bytes(figure)


def _draw(axes: Any, chart: Chart) -> None:
    (first, last), (low, high) = bounds(chart)
    axes.grid(axis="y", alpha=0.3)
    for number, (name, bars) in enumerate(chart.bars.items()):
        edges, widths, heights = [b[0] for b in bars], [b[1] - b[0] for b in bars], [b[2] for b in bars]
        axes.bar(
            edges,
            heights,
            widths,
            align="edge",
            color=_COLOURS[number % 5],
            alpha=0.75,
            edgecolor="white",
            linewidth=0.5,
            label=_plain(name),
        )
    for number, (name, points) in enumerate(chart.drawn.items(), start=len(chart.bars)):
        kept = thin(points)
        marker = "o" if len(kept) <= 30 else ""
        axes.plot(
            *zip(*kept, strict=True),
            color=_COLOURS[number % 5],
            linestyle=_DASHES[number % 5],
            marker=marker,
            markersize=3,
            label=_plain(name),
        )
    if chart.dots:
        axes.scatter(*zip(*chart.dots, strict=True), s=8, color=_COLOURS[0], alpha=0.5, linewidths=0)
    for x, least, greatest in chart.whiskers:
        axes.plot([x, x], [least, greatest], color=_COLOURS[1], linewidth=1)
    if chart.diagonal:
        axes.plot(
            [max(first, low), min(last, high)],
            [max(first, low), min(last, high)],
            color=_SOFT,
            linestyle=":",
            linewidth=1,
        )
    for at, label in chart.marks.items():
        axes.axvline(at, color=_SOFT, linestyle=":", linewidth=1)
        axes.annotate(
            _plain(label),
            (at, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=7,
            color=_SOFT,
            ha="left",
            va="bottom",
        )
    if chart.frame is not None:
        axes.set_xlim(*chart.frame[0])
        axes.set_ylim(*chart.frame[1])
    if len(chart.bars) + len(chart.drawn) > 1:
        axes.legend(fontsize=8, frameon=False)


def _matrix_bytes(title: str, counts: Sequence[Sequence[int]], labels: Sequence[str]) -> bytes:
    from matplotlib.figure import Figure

    size = min(12.0, 2.4 + 0.45 * len(labels))
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = [[n / (sum(row) or 1) for n in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(_plain(title), fontsize=11)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    names = [_plain(name) for name in labels]
    axes.set_xticks(range(len(labels)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), names, fontsize=8)
    if len(labels) <= 30:
        for i, row in enumerate(counts):
            for j, n in enumerate(row):
                axes.text(
                    j, i, str(n), ha="center", va="center", fontsize=8, color="white" if shares[i][j] > 0.6 else "black"
                )
    return _bytes(figure)


def _bytes(figure: Any) -> bytes:
    import warnings

    from matplotlib import rc_context

    target = io.BytesIO()
    with warnings.catch_warnings(), rc_context({"font.family": "sans-serif"}):
        # A label in a script that matplotlib's own font has not: a box is drawn, the SVG beside it is right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, format="png", dpi=_DPI, metadata={"Software": None})
    return target.getvalue()


def _plain(text: str) -> str:
    """matplotlib takes what stands between dollar signs for mathematics."""
    return text.replace("$", r"\$")
