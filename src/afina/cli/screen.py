"""How runs look in a terminal: numbers in words, columns, one line a run, the page about one run."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from afina.watch.overview import RunSummary

__all__ = ["columns", "duration", "list_lines", "number", "page", "size", "status_lines", "totals"]

_COLOURS = {
    "RUNNING": "green",
    "PENDING": "yellow",
    "FINISHED": "blue",
    "STOPPED": "yellow",
    "FAILED": "red",
    "UNKNOWN": "magenta",
}
_DASH = "-"


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3 h 05`, `2 d 4 h`."""
    if seconds is None:
        return _DASH
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d}"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def number(value: float | None, digits: int = 4) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def size(num_bytes: int) -> str:
    """In decimal units, as `df -H` and quotas count."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> list[str]:
    """Aligned lines, the heads first; the columns named in `right` are aligned to the right.

    To a terminal the state is coloured and lines are cut at its width; into a pipe they are whole.
    """
    flat = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(heads), *flat]) for i in range(len(heads))]
    shown = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = []
    for row in [list(heads), *flat]:
        cells = (
            cell.rjust(width) if head in right else cell.ljust(width)
            for head, cell, width in zip(heads, row, widths, strict=True)
        )
        line = "  ".join(cells).rstrip()
        line = line if shown is None else line[:shown]
        state = row[0]
        lines.append(_coloured(state) + line[len(state) :])
    return lines


def _coloured(word: str) -> str:
    """A state in its colour, where somebody sees it (https://no-color.org)."""
    wanted = word in _COLOURS and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return click.style(word, fg=_COLOURS[word]) if wanted else word


def status_lines(summaries: Sequence[RunSummary], names: Sequence[str]) -> list[str]:
    """One line a run: where it is, how fast, what it waits for."""
    heads = ("state", "run", "step", "epoch", "loss", "best", "tokens/s", "tries", "left", "job", "")
    rows = [_status_row(summary, name) for summary, name in zip(summaries, names, strict=True)]
    return columns(heads, rows, right=("step", "epoch", "loss", "tokens/s", "tries", "left"))


def _status_row(s: RunSummary, name: str) -> list[str]:
    return [
        s.state,
        name,
        f"{s.step}/{s.max_steps}" if s.max_steps else str(s.step),
        number(s.epoch, 2),
        number(s.loss),
        f"{s.best_metric} {number(s.best_value)}" if s.best_value is not None else _DASH,
        f"{s.tokens_per_s:,.0f}" if s.tokens_per_s else _DASH,
        str(s.attempts),
        duration(s.seconds_left),
        s.job_id or _DASH,
        s.why or "",
    ]


def list_lines(summaries: Sequence[RunSummary], names: Sequence[str], sizes: Sequence[int] | None) -> list[str]:
    """One line a run: how it stands, how good, how old, and how large if that was asked for."""
    heads = ["state", "best", "", "age", *(["size"] if sizes is not None else []), "run"]
    now = time.time()
    rows = [
        [
            s.state,
            number(s.best_value),
            s.best_metric or "",
            duration(now - s.made) if s.made else _DASH,
            *([size(sizes[i])] if sizes is not None else []),
            name,
        ]
        for i, (s, name) in enumerate(zip(summaries, names, strict=True))
    ]
    return columns(heads, rows, right=("best", "age", "size"))


def totals(summaries: Sequence[RunSummary]) -> str:
    counted = Counter(s.state for s in summaries)
    parts = ", ".join(f"{count} {state.lower()}" for state, count in counted.most_common())
    return f"{len(summaries)} run{'s' if len(summaries) != 1 else ''}: {parts}"


def page(s: RunSummary) -> list[str]:
    """All about one run."""
    step = f"{s.step} of {s.max_steps}" if s.max_steps else str(s.step)
    lines = [f"{_coloured(s.state)}  step {step}  job {s.job_id or '-'}  {s.run}"]
    facts: list[tuple[bool, Callable[[], str]]] = [
        (bool(s.why), lambda: f"{s.why}"),
        (s.starts is not None, lambda: f"Slurm expects it to start at {_clock(s.starts)}"),
        (s.epoch is not None, lambda: f"epoch {number(s.epoch, 2)}"),
        (s.loss is not None, lambda: f"loss {number(s.loss)}"),
        (
            s.best_value is not None and not s.metrics,
            lambda: f"best {s.best_metric} {number(s.best_value)} at step {s.best_step}",
        ),
        (bool(s.tokens_per_s), lambda: f"{s.tokens_per_s:,.0f} real tokens/s"),
        (s.seconds_left is not None, lambda: f"about {duration(s.seconds_left)} of training left"),
        (s.limit_s is not None, lambda: f"{duration(s.limit_s)} to the job's time limit"),
        (s.attempts > 1, lambda: f"{s.attempts} attempts, the newest {s.attempt}"),
        (bool(s.nodes), lambda: f"on {s.nodes}"),
    ]
    lines += [f"  {text()}" for there, text in facts if there]
    lines += [f"  {name} {value:.6f}" for name, value in (s.metrics or {}).items() if isinstance(value, float)]
    if s.error and s.state == "FAILED":
        lines = [line for line in lines if line != f"  {s.why}"] + [f"  {s.error}"]
    elif s.remedy:
        lines.append(f"  to do: {s.remedy}")
    lines += [f"  records: {command}" for command in s.sync]
    return lines


def _clock(when: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
