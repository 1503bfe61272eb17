"""The page as HTML: frame, tables, pairs and notes. Pure; every text is escaped here.

Nothing is fetched. The one script (`page.js`, allowed by its hash) adds values under the pointer, zoom, sorting and filters; the page is
whole without it. It follows the reader's light or dark mode, prints in black on white, and works by keyboard: the list of sections comes
first, and what scrolls can be focused.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from afina.reports.charts import Chart
from afina.reports.drawing import LIGHT, inline_svg

__all__ = ["cell", "document", "figures", "note", "pairs", "pre", "scroll", "seconds", "table", "tiles", "warnings"]

_PAGE = {"page": "#fff", "card": "#f4f6f8", "cell": "26, 93, 171"}
_DARK = {
    "text": "#e6e9ec",
    "soft": "#a3adb6",
    "page": "#15181b",
    "rule": "#3a4147",
    "card": "#1d2125",
    "cell": "96, 165, 250",
    "line-1": "#7db4f5",
    "line-2": "#f2a272",
    "line-3": "#84cf95",
    "line-4": "#d7a0e4",
    "line-5": "#d9c85e",
    "line-6": "#6fd0d8",
}


@cache
def _assets() -> tuple[str, str, str]:
    """Style, script, and the script's hash as a content security policy names it."""
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    light, dark = (" ".join(f"--{k}: {v};" for k, v in colours.items()) for colours in ({**LIGHT, **_PAGE}, _DARK))
    colours = f":root {{ color-scheme: light dark; {light} }}\n"
    colours += f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return colours + style, script, f"sha256-{digest}"


def document(title: str, about: str, lead: str, sections: Sequence[tuple[str, str]], folded: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        title, about: plain text.
        lead: HTML above the list of sections.
        sections: titles in plain text with their HTML; empty ones are left out.
        folded: titles of sections that are closed until someone opens them.
    """
    kept = [(name, html) for name, html in sections if html]
    links = "".join(f'<li><a href="#{_slug(name)}">{escape(name)}</a></li>' for name, _ in kept)
    body = "\n".join(_section(name, html, name in folded) for name, html in kept)
    style, script, digest = _assets()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src '{digest}'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} – afina</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="soft">{escape(about)}</p>\n{lead}\n</header>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n{body}\n</main>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def _section(name: str, html: str, folded: bool) -> str:
    head = f'<h2 id="{_slug(name)}">{escape(name)}</h2>'
    if folded:
        return f"<section><details><summary>{head}</summary>\n{html}</details></section>"
    return f"<section>{head}\n{html}</section>"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def pairs(rows: Mapping[str, Any]) -> str:
    """A table of names and values, without those that are None."""
    cells = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td>{cell(v)}</td></tr>' for k, v in rows.items() if v is not None
    )
    return f'<table class="pairs">{cells}</table>' if cells else ""


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Any]],
    caption: str,
    *,
    kind: str = "numbers",
    links: Mapping[str, str] | None = None,
    remarks: Mapping[str, str] | None = None,
) -> str:
    """A table with a head, sortable where the script runs. A table wider than the page scrolls, also by keyboard.

    Args:
        links: text of a first cell -> its relative address.
        remarks: text of a first cell -> what stands below it.
    """
    if not rows:
        return ""

    def first(value: Any) -> str:
        # A name breaks at its commas and not in the middle of 1e-4.
        shown, target = cell(value), (links or {}).get(str(value))
        shown = shown.replace(",", ",<wbr>") if isinstance(value, str) else shown
        remark = (remarks or {}).get(str(value))
        html = f'<a href="{escape(target, quote=True)}">{shown}</a>' if target else shown
        return f"{html}<small>{escape(remark)}</small>" if remark else html

    kinds = [next(filter(None, (_kind(row[i]) for row in rows)), "") for i in range(len(heads))]
    head = "".join(f'<th scope="col"{of}>{escape(h)}</th>' for h, of in zip(heads, kinds, strict=True))
    body = "".join(
        f"<tr><td{_kind(row[0])}>{first(row[0])}</td>{''.join(f'<td{_kind(v)}>{cell(v)}</td>' for v in row[1:])}</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    sortable = " sortable" if len(rows) > 1 else ""
    whole = f'<table class="{kind}{sortable}">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return scroll(whole, caption or ", ".join(heads))


def _kind(value: Any) -> str:
    """The class of a cell: words stand at the left, long ones are wrapped; numbers have none."""
    if not isinstance(value, str) or not re.match(r"[^\W\d_]", value):
        return ""
    if len(value) <= 30:
        return ' class="words"'
    return f' class="words {"long" if " " in value else "name"}"'


def scroll(html: str, name: str) -> str:
    """A box that scrolls if its content is wider than the page."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(name, quote=True)}">{html}</div>'


def tiles(rows: Mapping[str, tuple[str, str]]) -> str:
    """The most important figures, the first one large: name -> value, and a line under it."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<small>{escape(below)}</small>' if below else ''}</dd></div>"
        for name, (value, below) in rows.items()
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def figures(charts: Sequence[Chart], drawings: Mapping[str, str]) -> str:
    """Charts side by side, as far as there is room, each with its title under it."""
    html = ""
    for chart in filter(None, charts):
        drawn = scroll(inline_svg(drawings[chart.key]), chart.title)
        html += f"<figure>{drawn}<figcaption>{escape(chart.caption)}</figcaption></figure>"
    return f'<div class="charts">{html}</div>' if html else ""


def pre(text: str, name: str) -> str:
    return f'<pre tabindex="0" role="group" aria-label="{escape(name, quote=True)}">{escape(text)}</pre>'


def note(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def warnings(lines: Sequence[str]) -> str:
    """Warnings that stand beside the numbers they spoil."""
    return "".join(f'<p class="warning"><strong>Warning:</strong> {escape(line)}</p>' for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return "–"
    return escape(f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value))


def seconds(value: Any) -> str | None:
    """1:02:03, 2:03, 1.5 s."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        return None
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
