"""The page as HTML: frame, style, tables, pairs and notes. Pure; every text is escaped here.

No script, no image, nothing to fetch. Follows the reader's light or dark mode, prints in black on white, and works by keyboard: the list of
sections comes first, and what scrolls can be focused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from afina.reports.charts import Chart, svg

__all__ = [
    "FIGURE_STYLE",
    "cell",
    "document",
    "figure",
    "note",
    "number",
    "pairs",
    "pre",
    "scroll",
    "seconds",
    "table",
    "tiles",
    "warnings",
]

_LIGHT = """--text: #1c2024; --soft: #56606a; --page: #fff; --rule: #d5dade; --card: #f4f6f8; --cell: 26, 93, 171;
  --line-1: #1a5dab; --line-2: #b3470b; --line-3: #2a7a3b; --line-4: #8a3c9c; --line-5: #6a5a00;"""
_DARK = """--text: #e6e9ec; --soft: #a3adb6; --page: #15181b; --rule: #3a4147; --card: #1d2125; --cell: 96, 165, 250;
  --line-1: #7db4f5; --line-2: #f2a272; --line-3: #84cf95; --line-4: #d7a0e4; --line-5: #d9c85e;"""

_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere; }}
h1 {{ line-height: 1.2; margin-bottom: 0; }} h2 {{ margin: 2.5rem 0 1rem; border-bottom: 1px solid var(--rule); }}
h3 {{ margin: 1.5rem 0 .5rem; font-size: 1rem; }}
a {{ color: var(--line-1); }} a:focus-visible, [tabindex]:focus-visible {{ outline: 3px solid var(--line-2); outline-offset: 2px; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: .6rem 0; margin: 1rem 0 0; list-style: none;
  border-block: 1px solid var(--rule); }}
table {{ border-collapse: collapse; margin: .5rem 0; }} caption {{ text-align: left; color: var(--soft); padding-bottom: .3rem; }}
th, td {{ padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }}
th {{ color: var(--soft); font-weight: 600; }} thead th {{ white-space: nowrap; overflow-wrap: normal; }}
tbody tr {{ border-top: 1px solid var(--rule); }} .pairs th {{ min-width: 11rem; overflow-wrap: break-word; }}
.numbers td, .numbers thead th {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.numbers td:first-child, .numbers thead th:first-child {{ text-align: left; }}
.scroll {{ overflow-x: auto; }}
.matrix td, .matrix th {{ padding: .4rem .8rem; }} .matrix td {{ border: 1px solid var(--rule); }}
.text td {{ overflow-wrap: break-word; }} .text td:last-child {{ overflow-wrap: anywhere; min-width: 18rem; white-space: pre-wrap; }}
pre {{ overflow: auto; max-height: 32rem; padding: .8rem; border: 1px solid var(--rule); background: var(--card); font-size: 14px; }}
dl.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }}
.tiles div {{ background: var(--card); border-radius: .5rem; padding: .6rem .9rem; }}
.tiles dt {{ color: var(--soft); font-size: .85rem; }} .tiles dd {{ margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }}
.tiles small {{ display: block; font-size: .8rem; color: var(--soft); }}
figure {{ margin: 1.2rem 0; }} figcaption {{ color: var(--soft); }} svg {{ display: block; width: 100%; min-width: 34rem; height: auto; }}
svg text {{ fill: var(--text); font: 13px system-ui, sans-serif; }} svg .axis, svg .mark {{ fill: var(--soft); }}
.soft {{ color: var(--soft); }} .warning {{ border-left: 4px solid var(--line-2); padding-left: .7rem; margin: .4rem 0; }}
@media (max-width: 40rem) {{ .pairs th {{ min-width: 0; }} }}
@media print {{ svg {{ min-width: 0; }} body {{ max-width: none; margin: 0; font-size: 11pt; }} nav {{ display: none; }} pre {{ max-height: none; white-space: pre-wrap; }}
  .scroll {{ overflow: visible; }} h2, h3 {{ break-after: avoid; }} svg, .tiles div {{ break-inside: avoid; }} tr {{ break-inside: avoid; }}
  svg, td, .tiles div {{ print-color-adjust: exact; }} }}
"""

#: For an SVG file that stands alone: on white in every browser.
FIGURE_STYLE = (
    f"svg {{ background: #fff; {_LIGHT} }} text {{ fill: var(--text); font: 13px system-ui, Helvetica, Arial, sans-serif; }} "
    ".axis, .mark { fill: var(--soft); }"
)


def document(title: str, about: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole page.

    Args:
        title, about: plain text.
        lead: HTML above the list of sections.
        sections: titles in plain text with their HTML; empty ones are left out.
    """
    kept = [(name, html) for name, html in sections if html]
    links = "".join(f'<li><a href="#{_slug(name)}">{escape(name)}</a></li>' for name, _ in kept)
    body = "\n".join(f'<section><h2 id="{_slug(name)}">{escape(name)}</h2>\n{html}</section>' for name, html in kept)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} – afina</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="soft">{escape(about)}</p>\n{lead}\n</header>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )


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
) -> str:
    """A table with a head. A table wider than the page scrolls, also by keyboard.

    Args:
        links: text of a first cell -> its relative address.
    """
    if not rows:
        return ""
    links = links or {}

    def first(value: Any) -> str:
        shown, target = cell(value), links.get(str(value))
        return f'<a href="{escape(target, quote=True)}">{shown}</a>' if target else shown

    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "".join(
        f"<tr><td>{first(row[0])}</td>{''.join(f'<td>{cell(v)}</td>' for v in row[1:])}</tr>" for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    whole = f'<table class="{kind}">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return scroll(whole, caption or ", ".join(heads))


def scroll(html: str, name: str) -> str:
    """A box that scrolls if its content is wider than the page."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(name, quote=True)}">{html}</div>'


def tiles(rows: Mapping[str, tuple[str, str]]) -> str:
    """The most important figures: name -> value, and a line under it."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<small>{escape(below)}</small>' if below else ''}</dd></div>"
        for name, (value, below) in rows.items()
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def figure(chart: Chart) -> str:
    """A chart with its title under it; an empty string if there is nothing to draw."""
    drawn = svg(chart)
    return (
        f"<figure>{scroll(drawn, chart.title)}<figcaption>{escape(chart.title)}</figcaption></figure>" if drawn else ""
    )


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
    return escape(f"{value:.6g}" if isinstance(value, float) else str(value))


def number(value: Any, digits: int = 4) -> str | None:
    """A number with `digits` digits after the point; None if `value` is not a number."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) and not isinstance(value, bool) else None


def seconds(value: Any) -> str | None:
    """1:02:03, 2:03, 1.5 s."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        return None
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
