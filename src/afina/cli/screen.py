"""Runs and plans on a terminal: numbers in words, tables that fit its width, the page about one run."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from afina.text import aligned, plural, short_duration, size_in_words

if TYPE_CHECKING:
    from afina.watch.overview import RunSummary

__all__ = [
    "LIST",
    "STATUS",
    "number",
    "page",
    "run_table",
    "short_labels",
    "sorted_runs",
    "tables",
    "totals",
]

_COLOURS = {
    "RUNNING": "green",
    "PENDING": "yellow",
    "FINISHED": "blue",
    "STOPPED": "yellow",
    "FAILED": "red",
    "UNKNOWN": "magenta",
}
_DASH = "-"
#: The columns of `afina status` and of `afina list`; `*` stands for the keys in which the recipes differ.
STATUS = ("state", "run", "*", "step", "epoch", "loss", "best", "tokens/s", "attempts", "left", "job", "why")
LIST = ("state", "best", "age", "*", "run")
#: More keys than these are shown only with --columns: the runs have little in common.
_MOST_KEYS = 4


def number(value: float | None, digits: int = 4) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


@dataclass(frozen=True)
class _Column:
    """One column of a table of runs.

    Attributes:
        cell: the text of a run's cell.
        key: what to sort by; None comes last.
        rank: where the table is too wide, columns of a higher rank are left out first.
        least: it may be shortened to this width; 0: never.
    """

    cell: Callable[[RunSummary], str]
    key: Callable[[RunSummary], Any]
    right: bool = False
    rank: int = 0
    least: int = 0


def _columns(names: Mapping[Path, str], sizes: Mapping[Path, int]) -> dict[str, _Column]:
    """The columns that every run has, by name."""
    now = time.time()

    def best(s: RunSummary) -> Any:
        if s.best_value is None:
            return None
        return (s.best_metric or "", s.best_value if s.best_is_lowest else -s.best_value)

    def step(s: RunSummary) -> str:
        return f"{s.step}/{s.max_steps}" if s.max_steps else str(s.step)

    return {
        "state": _Column(lambda s: s.state, lambda s: tuple(_COLOURS).index(s.state) if s.state in _COLOURS else 9),
        "run": _Column(lambda s: names[s.run], lambda s: _natural(names[s.run]), least=14),
        "step": _Column(step, lambda s: -s.step, right=True, rank=2),
        "epoch": _Column(lambda s: number(s.epoch, 2), lambda s: s.epoch, right=True, rank=7),
        "loss": _Column(lambda s: number(s.loss), lambda s: s.loss, right=True, rank=5),
        "best": _Column(
            lambda s: f"{s.best_metric} {number(s.best_value)}" if s.best_value is not None else _DASH, best
        ),
        "tokens/s": _rate(lambda s: s.tokens_per_s),
        "examples/s": _rate(lambda s: s.examples_per_s),
        "attempts": _Column(lambda s: str(s.attempts), lambda s: -s.attempts, right=True, rank=6),
        "left": _Column(lambda s: short_duration(s.seconds_left), lambda s: s.seconds_left, right=True, rank=1),
        "job": _Column(lambda s: s.job_id or _DASH, lambda s: _natural(s.job_id or ""), rank=1),
        "nodes": _Column(lambda s: s.nodes or _DASH, lambda s: s.nodes, rank=6),
        "age": _Column(
            lambda s: short_duration(now - s.made) if s.made else _DASH, lambda s: -s.made, right=True, rank=1
        ),
        "size": _Column(
            lambda s: size_in_words(sizes[s.run]) if s.run in sizes else _DASH,
            lambda s: -sizes.get(s.run, 0),
            right=True,
        ),
        "why": _Column(lambda s: s.why or "", lambda s: s.why or None, rank=8),
    }


def _rate(of: Callable[[RunSummary], float | None]) -> _Column:
    return _Column(lambda s: f"{rate:,.0f}" if (rate := of(s)) else _DASH, lambda s: -(of(s) or 0), right=True, rank=1)


def _named(word: str, summaries: Sequence[RunSummary], known: Mapping[str, _Column]) -> tuple[str, _Column]:
    """A column by its name: one that every run has, a key of the recipe or the end of one, or a metric.

    Raises:
        UsageError: there is none; with the nearest.
    """
    from afina.errors import nearest

    word = {"name": "run", "tries": "attempts"}.get(word, word)
    if word in known:
        return word, known[word]
    keys = list(dict.fromkeys(key for s in summaries for key in s.recipe))
    named = [key for key in keys if key == word or key.rpartition(".")[2] == word]
    if named:  # `seed` is `train.seed`, not that of a part of the data
        key = min(named, key=lambda key: key.count("."))
        return key, _key_column(key)
    metrics = list(dict.fromkeys(name.removeprefix("eval_") for s in summaries for name in s.metrics or {}))
    if word in metrics:

        def value(s: RunSummary) -> Any:
            found = (s.metrics or {}).get(f"eval_{word}", (s.metrics or {}).get(word))
            return found if isinstance(found, int | float) else None

        return word, _Column(lambda s: number(value(s)), value, right=True)
    short = [key.rpartition(".")[2] for key in keys]
    raise click.UsageError(
        f"{word}: no such column. {nearest(word, [*known, *short, *metrics])} Known: {', '.join(known)}, any key of the recipe, any metric"
    )


def _key_column(key: str) -> _Column:
    def text(s: RunSummary) -> str:
        value = s.recipe.get(key)
        return _DASH if value is None else f"{value:g}" if isinstance(value, float) else _plain(value)

    return _Column(text, lambda s: s.recipe.get(key), right=True, rank=4, least=8)


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def sorted_runs(
    summaries: Sequence[RunSummary], by: str, names: Mapping[Path, str], sizes: Mapping[Path, int] = {}
) -> list[RunSummary]:
    """The runs by a column, the best, newest, largest or first one first; those without a value last."""
    key = _named(by, summaries, _columns(names, sizes))[1].key

    def order(s: RunSummary) -> tuple[bool, bool, Any]:
        value = key(s)
        return value is None, isinstance(value, str), str(value) if isinstance(value, list) and by != "run" else value

    try:
        return sorted(summaries, key=order)
    except TypeError:  # values of several kinds
        return sorted(summaries, key=lambda s: str(key(s)))


def run_table(
    summaries: Sequence[RunSummary],
    names: Mapping[Path, str],
    heads: Sequence[str],
    *,
    chosen: bool = False,
    sizes: Mapping[Path, int] = {},
) -> list[str]:
    """Aligned lines, the heads first, and below them what a narrow terminal left no room for.

    Args:
        heads: names of columns; `*`: the keys in which the recipes differ.
        chosen: the user named the columns: none is left out.

    To a terminal the state is coloured and the table fits its width; into a pipe all columns are whole.
    """
    known = _columns(names, sizes)
    columns: dict[str, _Column] = {}
    for head in heads:
        columns |= _differing(summaries) if head == "*" else dict([_named(head, summaries, known)])
    cells = {head: [" ".join(column.cell(s).split()) for s in summaries] for head, column in columns.items()}
    if not chosen:
        columns = {head: c for head, c in columns.items() if head in ("state", "run") or set(cells[head]) - {_DASH, ""}}
    metrics = {s.best_metric or "best" for s in summaries if s.best_value is not None}
    ends = Counter(head.rpartition(".")[2] for head in columns)
    titles = {head: end if ends[end := head.rpartition(".")[2]] == 1 else head for head in columns}
    if len(metrics) == 1 and "best" in columns and not metrics & columns.keys():
        titles["best"] = metrics.pop()
        cells["best"] = [number(s.best_value) for s in summaries]
        columns["best"] = replace(columns["best"], right=True)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    widths = {head: max(len(titles[head]), *map(len, cells[head])) for head in columns}
    if width is not None:
        widths = _fitted(widths, columns, width, chosen)
    rows = _rows([(titles[head], width, cells[head]) for head, width in widths.items()])
    lines = aligned(rows, [place for place, head in enumerate(widths) if columns[head].right])
    lines = [line[:width] for line in lines]
    if "why" in columns and "why" not in widths:
        lines += _reasons(summaries)
    return [_coloured_line(line) for line in lines]


def _differing(summaries: Sequence[RunSummary]) -> dict[str, _Column]:
    from afina.watch.reading import differing

    keys = [key for key in differing([s.recipe for s in summaries]) if not key.startswith("resources.")]
    return {key: _key_column(key) for key in keys} if len(keys) <= _MOST_KEYS else {}


def _fitted(widths: Mapping[str, int], columns: Mapping[str, _Column], width: int, chosen: bool) -> dict[str, int]:
    """The columns that fit into `width`, and their widths: some are shortened, those of the highest rank are left out."""
    kept = dict(widths)

    def least(head: str) -> int:
        return min(widths[head], columns[head].least or widths[head])

    def room() -> int:
        return width - sum(map(least, kept)) - 2 * (len(kept) - 1)

    while room() < 0 and not chosen and any(columns[head].rank for head in kept):
        del kept[max(kept, key=lambda head: columns[head].rank)]
    left = max(0, room())
    # What lacks least is made whole first: a name of a run may be long.
    for head in sorted(kept, key=lambda head: widths[head] - least(head)):
        more = min(left, widths[head] - least(head))
        kept[head] = least(head) + more
        left -= more
    return kept


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def short_labels(names: Sequence[str], width: int) -> list[str]:
    """Names of at most `width` characters that still differ: what the runs of a sweep have in common is left out first."""
    long: dict[str, list[str]] = {}
    for name in names:
        if len(name) > width:
            long.setdefault(name.partition("/")[0] if "/" in name else "", []).append(name)
    labels = {name: name for name in names}
    for alike in long.values():
        parts = [_PARTS.split(name) for name in alike]  # values and separators: 1e-4 stays whole
        before = sum(map(len, _in_common(parts)))
        after = sum(map(len, _in_common([of[::-1] for of in parts])))
        for name in alike:
            core = name[before : max(before, len(name) - after)] + "…" * (after > 0)
            room = width - len(core)
            head = name[:before] if before <= room else f"{name[: room - 1]}…"
            labels[name] = head + core if room > 0 else _middle(core, width)
    return [labels[name] for name in names]


#: Between the parts of a run's name.
_PARTS = re.compile(r"([=,/_ ]|(?<![0-9]e)-)")


def _in_common(texts: Sequence[list[str]]) -> list[str]:
    """The parts at the beginning that several names share."""
    shared = [set(of) for of in zip(*texts)] if len(texts) > 1 else []  # noqa: B905
    return [of.pop() for of in itertools.takewhile(lambda of: len(of) == 1, shared)]


def _middle(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    end = (width - 1) * 2 // 3
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _rows(columns: Sequence[tuple[str, int, Sequence[str]]]) -> list[list[str]]:
    """Head, width and cells of each column as rows; no cell is wider than its column."""
    shortened = [
        [
            _shortened(head, width),
            *(short_labels(texts, width) if head == "run" else [_shortened(t, width) for t in texts]),
        ]
        for head, width, texts in columns
    ]
    return [list(row) for row in zip(*shortened, strict=True)]


def tables(names: Sequence[str], values: Mapping[str, Sequence[str]]) -> list[str]:
    """One row for each run; on a terminal several tables below each other where one would be too wide."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    left, lines = dict(values), list[str]()
    while left:
        name = max(3, *map(len, names))
        part: dict[str, Sequence[str]] = {}
        used = min(name, 24)
        for head in list(left):
            needed = 2 + max(len(head), *map(len, left[head]))
            if width is not None and part and used + needed > width:
                break
            used += needed
            part[head] = left.pop(head)
        name = name if width is None else max(8, min(name, width - used + min(name, 24)))
        columns = [
            ("run", name, names),
            *((head, max(len(head), *map(len, texts)), texts) for head, texts in part.items()),
        ]
        lines += [line[:width] for line in aligned(_rows(columns), range(1, len(columns)))] + [""]
    return lines


def _reasons(summaries: Sequence[RunSummary]) -> list[str]:
    counted = Counter((s.state, s.why) for s in summaries if s.why)
    lines = [f"{state.lower()} ({count}): {why}" for (state, why), count in counted.most_common(5)]
    return lines + [f"… {len(counted) - 5} more reasons: afina status RUN"] * (len(counted) > 5)


def _coloured_line(line: str) -> str:
    word = re.match(r"[A-Z]*", line)
    return _coloured(word[0]) + line[word.end() :] if word else line


def _coloured(word: str) -> str:
    """A state in its colour, where somebody sees it (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return word if plain or word not in _COLOURS else click.style(word, fg=_COLOURS[word])


def totals(summaries: Sequence[RunSummary]) -> str:
    counted = Counter(s.state for s in summaries)
    parts = ", ".join(f"{count} {state.lower()}" for state, count in counted.most_common())
    return f"{plural(len(summaries), 'run')}: {parts}"


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
        (s.seconds_left is not None, lambda: f"{_about(s)} {short_duration(s.seconds_left)} of training left"),
        (s.limit_s is not None, lambda: f"{short_duration(s.limit_s)} to the job's time limit"),
        (s.attempts > 1, lambda: f"{s.attempts} attempts, the newest {s.attempt}"),
        (bool(s.nodes), lambda: f"on {s.nodes}"),
    ]
    lines += [f"  {text()}" for there, text in facts if there]
    lines += [f"  {name} {value:.6f}" for name, value in (s.metrics or {}).items() if isinstance(value, float)]
    lines += [f"  warning: {warning}" for warning in s.warnings]
    if s.error and s.state == "FAILED":
        lines = [line for line in lines if line != f"  {s.why}"] + [f"  {s.error}"]
    elif s.remedy:
        lines.append(f"  to do: {s.remedy}")
    lines += [f"  records: {command}" for command in s.sync]
    return lines


def _about(s: RunSummary) -> str:
    """The planned steps are the most that a run with early stopping makes."""
    return "at most" if any(key.startswith("train.early_stopping") for key in s.recipe) else "about"


def _clock(when: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
