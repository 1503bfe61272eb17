"""A page read back: its elements, texts, tables, and the values that its charts draw."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

from afina.reports import charts


class Page(HTMLParser):
    """The page as a tree walk: every element closed in order, its texts, its tables."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "wbr"})

    #: The page without its own script, and that script.
    OURS = (Path(charts.__file__).parent / "page.js").read_text("utf-8")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        assert self.source.count(f"<script>{self.OURS}</script>") == 1
        self.source = self.source.replace(f"<script>{self.OURS}</script>", "")
        self.open: list[str] = []
        self.names: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        values = dict(attrs)
        self.ids += [i for i in [values.get("id")] if i]
        assert not {"src", "onload", "onclick"} & values.keys(), "the page fetches or runs something"
        self.links += [v for v in [values.get("href")] if v is not None and tag == "a"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    def svgs(self) -> dict[str, ElementTree.Element]:
        """By key."""
        parts = re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)
        found = [ElementTree.fromstring(s.replace("xlink:href", "href")) for s in parts]
        return {str(svg.get("aria-labelledby")).split()[0].removesuffix("-title"): svg for svg in found}


def data_of(svg: ElementTree.Element, part: str) -> list[list[tuple[float, float]]]:
    """The values that are drawn as `part` (`d0`, `m1`, …), read back from the drawing as the page's script does it."""
    x0, y0, x1, y1 = map(float, str(svg.get("data-box")).split())
    left, right, low, high = map(float, str(svg.get("data-limits")).split())
    key = str(svg.get("aria-labelledby")).split()[0].removesuffix("title")
    paths = []
    for group in svg.iter():
        if group.get("id") == key + part:
            for path in group.iter("path"):
                numbers = list(map(float, re.findall(r"-?[\d.]+", str(path.get("d")))))
                if path.get("id") is None:
                    points = zip(numbers[::2], numbers[1::2], strict=True)
                    paths.append(
                        [
                            (left + (x - x0) / (x1 - x0) * (right - left), high - (y - y0) / (y1 - y0) * (high - low))
                            for x, y in points
                        ]
                    )
    return paths
