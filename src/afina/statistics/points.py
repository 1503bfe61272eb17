"""Points of a sweep, or of any runs: the mean of each over seeds or folds, the best one, and tests of the others against it.

Points are compared with the best one by a paired t-test over the seeds that both have finished, because a seed moves all points
together; p-values are Holm-corrected over those comparisons. A model that predicts one label, or does not beat the majority class, is no
best one. Not covered: the best was selected by the same numbers, which the remarks say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from afina.statistics.intervals import MeanInterval, PairedTest, paired_t_test
from afina.statistics.paired import holm
from afina.text import p_value, plural

__all__ = ["Row", "passed_over", "ranked", "remarks", "useless"]

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
        overlap: of folds, see `afina.statistics.intervals`; then `values` are by fold.
        pruned: the search ended this trial, because it was behind the others.
        ahead: its mean is better than that of the best, which it cannot be.
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
    overlap: float = 0.0
    pruned: bool = False
    ahead: bool = False

    @property
    def runs(self) -> int:
        return sum(self.states.values())


def ranked(rows: Sequence[Row], lower: bool, *, tested: bool = True) -> tuple[list[Row], Row | None]:
    """The rows, the best first and those without a finished run last, tested against the best; and the best, if there is one."""
    ordered = sorted(rows, key=lambda row: math.inf if row.interval is None else _mean(row) * (1 if lower else -1))
    best = _best(ordered)
    if best is None:
        return ordered, None
    place = ordered.index(best)
    ordered[:place] = [replace(row, ahead=_mean(row) != _mean(best)) for row in ordered[:place]]
    if not tested:
        return ordered, best
    return [best, *_compared([row for row in ordered if row is not best], best)], best


def useless(rows: Sequence[Row]) -> list[str]:
    """The notes where every model is of no use."""
    measured = [row for row in rows if row.interval is not None]
    if not measured or not all(row.weak for row in measured):
        return []
    return [
        "No best: every finished point predicts one and the same for all rows, or does not beat the majority class.",
        *(f"{row.point}: {row.weak}." for row in measured[:3]),
        "Their order is chance. Examine the data and the learning rate first.",
    ]


def _mean(row: Row) -> float:
    return math.nan if row.interval is None else row.interval.mean


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
            paired_t_test(
                [row.values[seed] for seed in shared], [best.values[seed] for seed in shared], overlap=row.overlap
            )
            if shared
            else None
        )
    ps = {at: test.p for at, test in enumerate(tests) if test is not None and test.p is not None}
    corrected = dict(zip(ps, holm(list(ps.values())), strict=True))
    return [replace(row, against_best=tests[at], p=corrected.get(at)) for at, row in enumerate(rows)]


def passed_over(rows: Sequence[Row]) -> list[str]:
    """A note on points whose mean is better than that of the best; empty if there are none."""
    ahead = [
        f"{row.point} ({'its models are of no use' if row.weak else f'{len(row.values)} of {row.runs} runs have finished'})"
        for row in rows
        if row.ahead
    ]
    return [f"Passed over, with a better mean: {', '.join(ahead)}."] if ahead else []


def remarks(rows: Sequence[Row], best: Row | None) -> list[str]:
    """The table in sentences."""
    if best is None:
        return ["No run has finished yet."]
    others = [row for row in rows if row is not best and row.interval is not None]
    notes, intervals, unit = [], _FOLDS if best.overlap else _INTERVALS, "fold" if best.overlap else "seed"
    if len(best.values) < best.runs:
        notes.append("Provisional: no point has a value of each of its runs.")
    if not others:
        return [*notes, f"Best so far, and the only one: {best.point}." if len(rows) > 1 else intervals]
    notes += passed_over(others)
    after = next((row for row in others if row.p is not None), others[0])
    test, count = after.against_best, sum(row.p is not None for row in others)
    head = f"Best: {best.point}. "
    if test is None or after.p is None:
        seeds = test.difference.count if test else 0
        why = "all pairs differ by the same" if seeds > 1 else f"they share {plural(seeds, f'finished {unit}')}"
        notes.append(f"{head}It cannot be compared with the next ({after.point}): {why}.")
    else:
        between = others[: others.index(after)]
        named = after.point if any(map(_differs_evenly, between)) else f"the next ({after.point})"
        better = "distinguishable" if after.p < _LEVEL else "NOT distinguishable"
        notes.append(
            f"{head}It is {better} from {named}: paired over {test.difference.count} {unit}s, "
            f"{_in_words(after.p)}{f' after correction for {count} comparisons' if count > 1 else ''}."
        )
    if all(row.runs == 1 for row in rows):
        notes.append(
            "One seed each cannot tell the other points apart either: the same command with --seeds 5 adds four to each."
        )
        return [*notes, intervals]
    left = [row for row in others if row.p is None and row is not after]
    if same := [row.point for row in left if _differs_evenly(row)]:
        notes.append(f"Same difference to the best in every seed, so that no test applies: {', '.join(same)}.")
    if early := [f"{row.point} ({len(row.values)} of {row.runs})" for row in left if not _differs_evenly(row)]:
        notes.append(f"Not tested, too few finished runs: {', '.join(early)}.")
    alike = [row.point for row in others if row.p is not None and row.p >= _LEVEL]
    if len(alike) > 1:
        notes.append(f"Nor from: {', '.join(alike[1:])}.")
    notes += [intervals, _PICKED]
    return notes


def _differs_evenly(row: Row) -> bool:
    """The difference to the best is the same in every seed, mostly zero: there is no spread to test with."""
    return row.p is None and row.against_best is not None and row.against_best.difference.count > 1


_INTERVALS = "Intervals: 95 %, t-distribution over seeds; p: paired t-test over the shared seeds, Holm-corrected."
_FOLDS = (
    "Intervals: 95 %, of the score to expect from a training on as many such rows; t-distribution over folds, corrected for the rows that "
    "their models share (Nadeau and Bengio 2003); p likewise, over the same folds."
)
_PICKED = "The best was selected by the same numbers, so its p-values are too small: confirm it with new seeds or on the test split."


def _in_words(p: float) -> str:
    return f"p {shown}" if (shown := p_value(p)).startswith("<") else f"p = {shown}"
