"""The results of a sweep: for each point of the grid the mean over seeds with its interval, and tests against the best point.

Pure: outcomes and states in, a table out. Points are compared with the best one by a paired t-test over the seeds that both
have finished, because a seed moves all points together; p-values are Holm-corrected over those comparisons. The trials of a
search are listed by their value. A score of the test split is shown and chooses nothing; a model that predicts one label, or does not beat
the majority class, is never the best. Not covered: the best was selected by the same numbers, which the table notes; trials are not
tested, because one run each has no spread.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from afina.errors import InputError, nearest
from afina.recipe.metrics import SCALARS, lower_is_better, metric_name, metric_range, own_metric, selection_metric
from afina.run.outcome import Outcome
from afina.statistics.intervals import MeanInterval, mean_interval
from afina.statistics.points import Row, passed_over, ranked, remarks, useless
from afina.sweeps.sweep_dir import SweepRecord
from afina.text import aligned, number, p_value, plural

__all__ = ["Table", "best_metric", "tabulate"]


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
    unit: str = "seeds"
    doubtful: tuple[dict[str, str], ...] = ()

    def __str__(self) -> str:
        better = "lower" if self.direction == "minimize" else "higher"
        head = f"{self.sweep}\n{self.metric} ({better} is better)"
        return "\n".join([head, "", *_lines(self), "", *self.notes, *_doubtful_lines(self.doubtful)])

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
            **({"doubtful": list(self.doubtful)} if self.doubtful else {}),
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
    for at, cell in enumerate(record.cells):
        grouped.setdefault(cell.name if record.search else cell.point, []).append(at)
    rows = []
    for point, numbers in grouped.items():
        values = _over_seeds(record, outcomes, numbers, column)
        beside = _over_seeds(record, outcomes, numbers, shown) if shown else {}
        reasons = [weak[n] for n in numbers if weak and _value(outcomes[n], column) is not None]
        rows.append(
            Row(
                point or "the recipe",
                tried[numbers[0]] if record.search and tried else _overrides(record, numbers[0]),
                values,
                dict(sorted(Counter(states[number] for number in numbers).items())),
                _interval(record, column, values),
                shown=_interval(record, shown, beside) if shown else None,
                weak=str(reasons[0]) if reasons and all(reasons) else "",
                overlap=record.overlap,
                pruned=any(o.pruned for n in numbers if (o := outcomes[n]) is not None),
            )
        )
    rows, best = ranked(rows, lower, tested=record.search is None)
    notes = useless(rows) or (_search_notes(rows, best, finished) if record.search else remarks(rows, best))
    if undefined := sum(_value(outcome, column) is None for outcome in finished):
        left_out = (
            f"{column} is not defined in {plural(undefined, 'finished run')}, which no mean and no comparison has"
        )
        notes = [f"{left_out}.", *(notes if best or undefined < len(finished) else [])]
    if shown:
        notes.append(
            f"{shown} is only shown: a choice by the test split would make its scores too kind. Chosen by {column}."
        )
    direction: Literal["maximize", "minimize"] = "minimize" if lower else "maximize"
    unit = ("folds × repeats" if record.repeats > 1 else "folds") if record.folds else "seeds"
    return Table(sweep, column, direction, tuple(rows), best, record.search is not None, tuple(notes), shown, unit)


def _overrides(record: SweepRecord, number: int) -> dict[str, str]:
    """The values of a cell, without its seed."""
    words = (word for word in record.cells[number].overrides if not word.startswith("train.seed="))
    return dict(word.split("=", 1) for word in words)


def _over_seeds(
    record: SweepRecord, outcomes: Sequence[Outcome | None], numbers: Sequence[int], column: str
) -> dict[int, float]:
    """The score of each finished run of a point, by its seed or the number of its fold."""
    known = {
        record.cells[number].fold or record.cells[number].seed or 0: _value(outcomes[number], column)
        for number in numbers
    }
    return {seed: value for seed, value in known.items() if value is not None}


def _value(outcome: Outcome | None, column: str) -> float | None:
    if outcome is None or outcome.outcome != "finished":
        return None
    value = outcome.metrics.get(column)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]


def _search_notes(rows: Sequence[Row], best: Row | None, finished: Sequence[Outcome]) -> list[str]:
    if best is None:
        return ["No trial has finished yet."]
    count = sum(row.interval is not None for row in rows)
    words = " ".join(f"{key}={value}" for key, value in best.overrides.items())
    pruned = sum(outcome.pruned for outcome in finished)
    return [
        f"Best of {count} finished{f', {pruned} of them pruned' if pruned else ''}: {best.point} ({words}).",
        *passed_over(rows),
        "The best of many single runs looks better than it is: compare it with its neighbours over seeds (--grid … --seeds 5).",
    ]


def _lines(table: Table) -> list[str]:
    if table.search:
        keys = list(dict.fromkeys(key for row in table.rows for key in row.overrides))
        head = ["trial", "value", *keys, "state"]
        body = [
            [
                row.point,
                number(row.interval.mean) if row.interval else "-",
                *(row.overrides.get(k, "-") for k in keys),
                _states(row),
            ]
            for row in table.rows
        ]
    else:
        head = [
            "point",
            "mean",
            "95 % interval",
            table.unit,
            "against the best",
            "p",
            "not finished",
        ]
        body = [[row.point, *_measured(row), _against(row, table), _p_cell(row), _left(row)] for row in table.rows]
        if len(table.rows) == 1:
            head, body = head[:4] + head[6:], [cells[:4] + cells[6:] for cells in body]
    if table.shown:
        head = [*head[:2], table.shown, "its 95 % interval", *head[2:]]
        body = [
            [*cells[:2], *([number(s.mean), _span(s)] if (s := row.shown) else ["-", "-"]), *cells[2:]]
            for cells, row in zip(body, table.rows, strict=True)
        ]
    if any(row.weak for row in table.rows):
        head, body = [*head, "remark"], [[*cells, row.weak] for cells, row in zip(body, table.rows, strict=True)]
    return aligned([head, *body])


def _doubtful_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ten most doubtful labels, and how many there are."""
    if not rows:
        return []
    issues = sum(row["issue"] == "yes" for row in rows)
    cells = [
        [
            f"{row['file']}:{row['row']}",
            row["label"],
            row["suggested"],
            row["probability"],
            _cut(row.get("text")),
        ]
        for row in rows[:10]
    ]
    head = f"Most doubtful labels, of {issues} that confident learning names:"
    return ["", head, *aligned([["row", "label", "suggested", "p(label)", "text"], *cells])]


def _cut(text: Any, most: int = 70) -> str:
    line = " ".join(str(text or "").split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _measured(row: Row) -> list[str]:
    seeds = f"{len(row.values)}/{row.runs}"
    if row.interval is None:
        return ["-", "-", seeds]
    return [number(row.interval.mean), _span(row.interval), seeds]


def _against(row: Row, table: Table) -> str:
    if table.best is not None and row.point == table.best.point:
        return "best"
    if row.against_best is None:
        return "-"
    difference = row.against_best.difference
    return f"{difference.mean:+.4f}" + ("" if difference.low is None else f" {_span(difference)}")


def _p_cell(row: Row) -> str:
    return "" if row.p is None else p_value(row.p)


def _states(row: Row) -> str:
    """The state of a trial, which is one run."""
    return "pruned" if row.pruned else next(iter(row.states), "").lower()


def _left(row: Row) -> str:
    """The states of a point's unfinished runs, with their numbers."""
    left = {state: count for state, count in row.states.items() if state != "FINISHED"}
    return ", ".join(f"{count} {state.lower()}" for state, count in left.items())


def _interval(record: SweepRecord, column: str, values: Mapping[Any, float]) -> MeanInterval | None:
    return mean_interval(list(values.values()), overlap=record.overlap, within=metric_range(column)) if values else None


def _span(interval: MeanInterval) -> str:
    return (
        "-" if interval.low is None or interval.high is None else f"[{number(interval.low)}, {number(interval.high)}]"
    )


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
        **({"pruned": True} if row.pruned else {}),
    }
