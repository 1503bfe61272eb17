"""The results of a sweep: for each point of the grid the mean over seeds with its interval, and tests against the best point.

Pure: outcomes and states in, a table out. Points are compared with the best one by a paired t-test over the seeds that both
have finished, because a seed moves all points together; p-values are Holm-corrected over those comparisons. The trials of a
search are listed by their value. A score of the test split is shown and chooses nothing; a model that predicts one label, or does not beat
the majority class, is no best one. Not covered: the best was selected by the same numbers, which the table notes; trials are not
tested, because one run each has no spread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from afina.errors import InputError, nearest
from afina.recipe.metrics import SCALARS, lower_is_better, metric_name, own_metric, selection_metric
from afina.run.outcome import Outcome
from afina.statistics.intervals import MeanInterval, PairedTest, mean_interval, paired_t_test
from afina.statistics.paired import holm
from afina.sweeps.sweep_dir import SweepRecord
from afina.text import aligned

__all__ = ["Row", "Table", "best_metric", "tabulate"]

_LEVEL = 0.05


@dataclass(frozen=True)
class Row:
    """A point of the grid, or a trial.

    Attributes:
        point: its name.
        overrides: its values, `key: text`.
        values: the metric of each finished seed (a trial's seed is the recipe's).
        states: how many of its runs are in which state.
        interval: mean over `values` with the 95 % interval; None before the first is finished.
        against_best: `this - best` over the shared seeds; None for the best itself, or without a shared seed.
        p: Holm-corrected; None without a test.
        shown: mean of the score that is shown beside it, with its interval.
        weak: why its models are of no use; empty if one of them is.
    """

    point: str
    overrides: Mapping[str, str]
    values: Mapping[int, float]
    states: Mapping[str, int]
    interval: MeanInterval | None = None
    against_best: PairedTest | None = None
    p: float | None = None
    shown: MeanInterval | None = None
    weak: str = ""

    @property
    def runs(self) -> int:
        return sum(self.states.values())


@dataclass(frozen=True)
class Table:
    """Rows, the best first; points without a finished run last. `str()` is what the command prints."""

    sweep: str
    metric: str
    direction: Literal["maximize", "minimize"]
    rows: tuple[Row, ...]
    best: Row | None
    search: bool
    notes: tuple[str, ...] = field(default=())
    shown: str | None = None

    def __str__(self) -> str:
        better = "lower" if self.direction == "minimize" else "higher"
        head = f"{self.sweep}\n{self.metric} ({better} is better)"
        return "\n".join([head, "", *_lines(self), "", *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "sweep": self.sweep,
            "metric": self.metric,
            "direction": self.direction,
            "shown": self.shown,
            "best": self.best.point if self.best else None,
            "rows": [_row_dict(row) for row in self.rows],
            "notes": list(self.notes),
        }


def best_metric(record: SweepRecord, task: str | None, given: str | None = None) -> str:
    """The column of `Outcome.metrics` to compare by: `eval_f1` for `f1`; by default the one that chooses the checkpoint.

    Raises:
        InputError: a metric that no task knows and the recipe does not name.
    """
    recipe = record.plan.recipe
    if given is not None:
        part, name = (given[:4], given[5:]) if given.startswith(("eval_", "test_")) else ("eval", given)
        own = [metric_name(text) for text in recipe.metric_texts if own_metric(text)]
        known = sorted({*SCALARS, *own, "loss"})
        if name not in known:
            hint = nearest(name, known)
            raise InputError(
                f"--metric {given}: is not a metric", f"{hint + ' ' if hint else ''}known: {', '.join(known)}"
            )
        return f"{part}_{name}"
    task = task or (recipe.task if recipe.task != "auto" else "single-label")
    return f"eval_{selection_metric(task, recipe.train.best_metric)}"


def tabulate(
    record: SweepRecord,
    outcomes: Sequence[Outcome | None],
    states: Sequence[str],
    *,
    sweep: str = "",
    metric: str | None = None,
    tried: Sequence[Mapping[str, str]] = (),
    weak: Sequence[str | None] = (),
) -> Table:
    """The table of a sweep.

    Args:
        outcomes: of each cell, in the order of `record.cells`.
        states: of each cell: PLANNED, PENDING, RUNNING, FINISHED, STOPPED, FAILED, UNKNOWN.
        metric: another metric than the one that chooses the checkpoint; one of the test split is only shown.
        tried: the values of each trial of a search.
        weak: of each cell, why its model is of no use, or None.
    """
    finished = [outcome for outcome in outcomes if outcome is not None and outcome.outcome == "finished"]
    task = finished[0].task if finished else None
    column = best_metric(record, task, metric)
    shown = column if column.startswith("test_") else None
    column = best_metric(record, task) if shown else column
    lower = lower_is_better(column, record.plan.recipe.metric_texts)
    grouped: dict[str, list[int]] = {}
    for number, cell in enumerate(record.cells):
        grouped.setdefault(cell.name if record.search else cell.point, []).append(number)
    rows = []
    for point, numbers in grouped.items():
        values = _over_seeds(record, outcomes, numbers, column)
        beside = _over_seeds(record, outcomes, numbers, shown) if shown else {}
        words = [word for word in record.cells[numbers[0]].overrides if not word.startswith("train.seed=")]
        overrides = tried[numbers[0]] if record.search and tried else dict(word.split("=", 1) for word in words)
        reasons = [weak[n] for n in numbers if weak and _value(outcomes[n], column) is not None]
        rows.append(
            Row(
                point or "the recipe",
                overrides,
                values,
                dict(sorted(Counter(states[number] for number in numbers).items())),
                mean_interval(list(values.values())) if values else None,
                shown=mean_interval(list(beside.values())) if beside else None,
                weak=str(reasons[0]) if reasons and all(reasons) else "",
            )
        )
    rows.sort(key=lambda row: math.inf if row.interval is None else row.interval.mean if lower else -row.interval.mean)
    best = _best(rows)
    if best is not None and not record.search:
        rows = [best, *_compared([row for row in rows if row is not best], best)]
    notes = _useless(rows) or (_search_notes(rows, best) if record.search else _notes(rows, best))
    if shown:
        notes.append(
            f"{shown} is only shown: a choice by the test split would make its scores too kind. Chosen by {column}."
        )
    direction: Literal["maximize", "minimize"] = "minimize" if lower else "maximize"
    return Table(sweep, column, direction, tuple(rows), best, record.search is not None, tuple(notes), shown)


def _over_seeds(
    record: SweepRecord, outcomes: Sequence[Outcome | None], numbers: Sequence[int], column: str
) -> dict[int, float]:
    """The score of each finished run of a point, by its seed."""
    known = {record.cells[number].seed or 0: _value(outcomes[number], column) for number in numbers}
    return {seed: value for seed, value in known.items() if value is not None}


def _useless(rows: Sequence[Row]) -> list[str]:
    """What takes the place of the notes where every model is of no use."""
    measured = [row for row in rows if row.interval is not None]
    if not measured or not all(row.weak for row in measured):
        return []
    return [
        "No best: every finished point predicts one and the same for all rows, or does not beat the majority class.",
        *(f"{row.point}: {row.weak}." for row in measured[:3]),
        "Their order is chance. Examine the data and the learning rate first.",
    ]


def _value(outcome: Outcome | None, column: str) -> float | None:
    if outcome is None or outcome.outcome != "finished":
        return None
    value = outcome.metrics.get(column)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]


def _best(rows: Sequence[Row]) -> Row | None:
    """The first point of which all runs have finished, else the first of all: one lucky seed does not win."""
    measured = [row for row in rows if row.interval is not None and not row.weak]
    complete = [row for row in measured if len(row.values) == row.runs]
    return next(iter(complete or measured), None)


def _compared(rows: Sequence[Row], best: Row) -> list[Row]:
    tests: list[PairedTest | None] = []
    for row in rows:
        shared = sorted(row.values.keys() & best.values.keys())
        tests.append(
            paired_t_test([row.values[seed] for seed in shared], [best.values[seed] for seed in shared])
            if shared
            else None
        )
    ps = {at: test.p for at, test in enumerate(tests) if test is not None and test.p is not None}
    corrected = dict(zip(ps, holm(list(ps.values())), strict=True))
    return [replace(row, against_best=tests[at], p=corrected.get(at)) for at, row in enumerate(rows)]


def _notes(rows: Sequence[Row], best: Row | None) -> list[str]:
    if best is None:
        return ["No run has finished yet."]
    others = [row for row in rows if row is not best and row.interval is not None]
    notes = []
    if len(best.values) < best.runs:
        notes.append("Provisional: no point has finished all its runs.")
    if not others:
        return [*notes, f"Best so far, and the only one: {best.point}." if len(rows) > 1 else _INTERVALS]
    after = next((row for row in others if row.p is not None), others[0])
    test, count = after.against_best, sum(row.p is not None for row in others)
    head = f"Best: {best.point}. "
    if test is None or after.p is None:
        seeds = test.difference.count if test else 0
        why = "all pairs differ by the same" if seeds > 1 else f"they share {seeds} finished seed{'s' * (seeds != 1)}"
        notes.append(f"{head}It cannot be compared with the next ({after.point}): {why}.")
    else:
        between = others[: others.index(after)]
        named = after.point if any(map(_differs_evenly, between)) else f"the next ({after.point})"
        better = "distinguishable" if after.p < _LEVEL else "NOT distinguishable"
        notes.append(
            f"{head}It is {better} from {named}: paired over {test.difference.count} seeds, "
            f"{_p(after.p)}{f' after correction for {count} comparisons' if count > 1 else ''}."
        )
    if all(row.runs == 1 for row in rows):
        notes.append(
            "One seed each cannot tell the other points apart either: the same command with --seeds 5 adds four to each."
        )
        return [*notes, _INTERVALS]
    left = [row for row in others if row.p is None and row is not after]
    if same := [row.point for row in left if _differs_evenly(row)]:
        notes.append(f"Same difference to the best in every seed, so that no test applies: {', '.join(same)}.")
    if early := [f"{row.point} ({len(row.values)} of {row.runs})" for row in left if not _differs_evenly(row)]:
        notes.append(f"Not tested, too few finished runs: {', '.join(early)}.")
    alike = [row.point for row in others if row.p is not None and row.p >= _LEVEL]
    if len(alike) > 1:
        notes.append(f"Nor from: {', '.join(alike[1:])}.")
    notes += [_INTERVALS, _PICKED]
    return notes


def _differs_evenly(row: Row) -> bool:
    """The difference to the best is the same in every seed, mostly zero: there is no spread to test with."""
    return row.p is None and row.against_best is not None and row.against_best.difference.count > 1


_INTERVALS = "Intervals: 95 %, t-distribution over seeds; p: paired t-test over the shared seeds, Holm-corrected."
_PICKED = "The best was selected by the same numbers, so its p-values are too small: confirm it with new seeds or on the test split."


def _search_notes(rows: Sequence[Row], best: Row | None) -> list[str]:
    if best is None:
        return ["No trial has finished yet."]
    count = sum(row.interval is not None for row in rows)
    words = " ".join(f"{key}={value}" for key, value in best.overrides.items())
    return [
        f"Best of {count} finished: {best.point} ({words}).",
        "The best of many single runs looks better than it is: compare it with its neighbours over seeds (--grid … --seeds 5).",
    ]


def _lines(table: Table) -> list[str]:
    if table.search:
        keys = list(dict.fromkeys(key for row in table.rows for key in row.overrides))
        head = ["trial", "value", *keys, "state"]
        body = [
            [
                row.point,
                _number(row.interval.mean) if row.interval else "-",
                *(row.overrides.get(k, "-") for k in keys),
                _states(row),
            ]
            for row in table.rows
        ]
    else:
        head = ["point", "mean", "95 % interval", "seeds", "against the best", "p", "not finished"]
        body = [[row.point, *_measured(row), _against(row, table), _p_cell(row), _left(row)] for row in table.rows]
        if len(table.rows) == 1:
            head, body = head[:4] + head[6:], [cells[:4] + cells[6:] for cells in body]
    if table.shown:
        head = [*head[:2], table.shown, "its 95 % interval", *head[2:]]
        body = [
            [*cells[:2], *([_number(s.mean), _span(s)] if (s := row.shown) else ["-", "-"]), *cells[2:]]
            for cells, row in zip(body, table.rows, strict=True)
        ]
    if any(row.weak for row in table.rows):
        head, body = [*head, "remark"], [[*cells, row.weak] for cells, row in zip(body, table.rows, strict=True)]
    return aligned([head, *body])


def _measured(row: Row) -> list[str]:
    seeds = f"{len(row.values)}/{row.runs}"
    if row.interval is None:
        return ["-", "-", seeds]
    return [_number(row.interval.mean), _span(row.interval), seeds]


def _against(row: Row, table: Table) -> str:
    if table.best is not None and row.point == table.best.point:
        return "best"
    if row.against_best is None:
        return "-"
    difference = row.against_best.difference
    return f"{difference.mean:+.4f}" + ("" if difference.low is None else f" {_span(difference)}")


def _p_cell(row: Row) -> str:
    return "" if row.p is None else _p(row.p).removeprefix("p ").removeprefix("= ")


def _states(row: Row) -> str:
    """The state of a trial, which is one run."""
    return next(iter(row.states), "").lower()


def _left(row: Row) -> str:
    """The states of a point's unfinished runs, with their numbers."""
    left = {state: count for state, count in row.states.items() if state != "FINISHED"}
    return ", ".join(f"{count} {state.lower()}" for state, count in left.items())


def _span(interval: MeanInterval) -> str:
    return (
        "-" if interval.low is None or interval.high is None else f"[{_number(interval.low)}, {_number(interval.high)}]"
    )


def _number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3e}"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _row_dict(row: Row) -> dict[str, Any]:
    interval, test = row.interval, row.against_best
    return {
        "point": row.point,
        "overrides": dict(row.overrides),
        "values": {str(seed): value for seed, value in row.values.items()},
        "states": dict(row.states),
        "mean": interval.mean if interval else None,
        "interval": [interval.low, interval.high] if interval else None,
        "standard_deviation": interval.deviation if interval else None,
        "difference_to_best": test.difference.mean if test else None,
        "difference_interval": [test.difference.low, test.difference.high] if test else None,
        "p_holm": row.p,
        "shown": {"mean": row.shown.mean, "interval": [row.shown.low, row.shown.high]} if row.shown else None,
        "weak": row.weak or None,
    }
