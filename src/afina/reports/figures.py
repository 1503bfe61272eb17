"""Charts as files: SVG always, PNG on request. Other files in the folder stay.

There is one drawing, the SVG; a PNG file holds the same lines, rectangles, circles and texts, drawn by matplotlib, which is
imported inside the function and needs no display. Text in SVG stays text, in the reader's own fonts.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from afina.errors import EnvironmentProblem
from afina.files import write_atomic
from afina.reports.charts import Chart, svg
from afina.reports.page import FIGURE_STYLE

__all__ = ["need_matplotlib", "png_bytes", "write_figures"]

_DPI = 160
#: A pixel of the SVG in points: 100 pixels are one inch.
_POINT = 0.72


def need_matplotlib() -> None:
    """Check, before anything is written, that PNG files can be drawn.

    Raises:
        EnvironmentProblem: matplotlib is not installed here.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentProblem(
            "PNG files need matplotlib, which is not installed here",
            "pip install matplotlib, or run it in the image: `apptainer run afina.sif` in place of `afina`",
        )


def write_figures(folder: Path, charts: Iterable[Chart], *, png: bool = False) -> list[Path]:
    """Write `<key>.svg`, and with `png` `<key>.png`, of every chart that has something to draw; returns the paths.

    Raises:
        EnvironmentProblem: the folder cannot be written.
    """
    written = []
    for chart in filter(None, charts):
        drawn = svg(chart, style=FIGURE_STYLE)
        contents: dict[str, str | bytes] = {"svg": f'<?xml version="1.0" encoding="UTF-8"?>\n{drawn}\n'}
        if png:
            contents["png"] = png_bytes(drawn)
        for suffix, content in contents.items():
            written.append(folder / f"{chart.key}.{suffix}")
            write_atomic(written[-1], content)
    return written


def png_bytes(drawn: str) -> bytes:
    """An SVG file of `afina.reports.charts` as PNG. Only the elements and attributes that are used there are drawn."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    root = ElementTree.fromstring(drawn)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    target = io.BytesIO()
    with warnings.catch_warnings(), rc_context({"font.family": "sans-serif"}):
        figure = Figure(figsize=(width / 100, height / 100))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        colours = dict(re.findall(r"(--[\w-]+): (#\w+);", root.findtext("{*}style", "")))
        for order, element in enumerate(root):
            colour = "var(--soft)" if "class" in element.attrib else "var(--text)"
            given = {"fill": colour, **element.attrib}
            given = {key: re.sub(r"var\((.+)\)", lambda name: colours[name[1]], value) for key, value in given.items()}
            _draw(axes, element.tag.rpartition("}")[2], given, element.text or "", order)
        # A script that matplotlib's own font lacks: a box is drawn; the SVG beside it is right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, format="png", dpi=_DPI, metadata={"Software": None})
    return target.getvalue()


def _draw(axes: Any, tag: str, given: Mapping[str, str], text: str, order: int) -> None:
    """Draw one element of the SVG above those of a lower `order`."""
    from matplotlib.patches import Circle, Rectangle

    def numbers(*names: str) -> list[float]:
        return [float(given[name]) for name in names]

    if tag in ("line", "polyline"):
        points = [tuple(map(float, pair.split(","))) for pair in given.get("points", "").split()]
        points = points or [tuple(numbers("x1", "y1")), tuple(numbers("x2", "y2"))]
        dashes = [float(length) for length in given.get("stroke-dasharray", "").split()]
        width = float(given.get("stroke-width", 1)) * _POINT
        pattern = (0, [length * _POINT / width for length in dashes]) if dashes else "-"
        line = {"color": given["stroke"], "linewidth": width, "linestyle": pattern, "solid_capstyle": "butt"}
        axes.plot(*zip(*points, strict=True), **line, zorder=order)
    elif tag == "text":
        anchor = {"middle": "center", "end": "right"}.get(given.get("text-anchor", ""), "left")
        place = {"ha": anchor, "va": "baseline", "rotation_mode": "anchor", "rotation": 90 * ("transform" in given)}
        # Dollar signs are dollar signs.
        axes.text(*numbers("x", "y"), text, **place, color=given["fill"], fontsize=13 * _POINT, parse_math=False)
    elif tag in ("rect", "circle"):
        style: dict[str, Any] = {
            "color": given["fill"],
            "alpha": float(given.get("fill-opacity", 1)),
            "linewidth": 0,
            "zorder": order,
        }
        if tag == "rect":
            x, y, width, height = numbers("x", "y", "width", "height")
            axes.add_patch(Rectangle((x, y), width, height, **style))
        else:
            x, y, radius = numbers("cx", "cy", "r")
            axes.add_patch(Circle((x, y), radius, **style))
