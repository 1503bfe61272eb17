"""Seconds of a run by part, from a rehearsal or from earlier runs. Pure: numbers in, numbers out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import median

from afina.forecast.measurements import Earlier, Measured, Workload
from afina.run.plan import Plan
from afina.schedule import Schedule, embedding_seconds, stop_lead_s

__all__ = ["earlier_seconds", "evaluation_passes", "expected_stop_lead_s", "fit_line", "rehearsed_seconds"]

#: Two processes that start, TF-IDF of a few thousand rows, and the comparisons: measured on two cores.
_AROUND_EMBEDDING_S = 8.0


def evaluation_passes(plan: Plan, schedule: Schedule) -> int:
    """Passes over the eval split: as scheduled, and once more for the predictions of the best step."""
    return schedule.evaluations + (1 if plan.recipe.train.keep == "best" and schedule.evaluations > 1 else 0)


def rehearsed_seconds(measured: Measured, schedule: Schedule, evaluations: int, plan: Plan) -> dict[str, float]:
    fixed, slope = fit_line(measured.costs, measured.seconds)
    processes = plan.geometry.num_processes
    each = (measured.eval_seconds_per_cost or 0.0) * measured.eval_cost / processes
    test = (measured.eval_seconds_per_cost or 0.0) * measured.test_cost / processes
    steps = schedule.total_steps * (fixed + slope * measured.mean_cost)
    by_clock = steps / (minutes * 60) if (minutes := plan.recipe.train.save_minutes) else 0.0
    saves = max(schedule.saves, by_clock) + 1
    return {
        "startup": measured.startup_seconds,
        "steps": steps,
        "evaluations": evaluations * each + test,
        "saves": saves * (measured.stall_seconds or 0.0) + (measured.save_seconds or 0.0),
        "simple_models": _simple_seconds(steps),
    }


def earlier_seconds(runs: Sequence[Earlier], work: Workload, schedule: Schedule, evaluations: int) -> dict[str, float]:
    """By the mean of the newest three."""
    runs = runs[:3]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    each = mean([run.other_seconds / max(1, run.evaluated_tokens) for run in runs])
    epochs = schedule.examples_after(schedule.total_steps) / schedule.rows
    steps = epochs * work.tokens["train"] / mean([run.tokens_per_second for run in runs])
    simple = [run.simple_seconds for run in runs if run.simple_seconds is not None]
    return {
        "startup": mean([run.startup_seconds for run in runs]),
        "steps": steps,
        "evaluations": each * (evaluations * work.tokens.get("eval", 0) + work.tokens.get("test", 0)),
        "saves": 0.0,  # part of what the earlier runs took beside their steps
        "simple_models": mean(simple) if simple else _simple_seconds(steps),
    }


def _simple_seconds(training_s: float) -> float:
    return _AROUND_EMBEDDING_S + embedding_seconds(training_s)


def expected_stop_lead_s(rehearsed: Measured | None, alike: Sequence[Earlier]) -> float:
    """How long before its time limit an attempt stops training."""
    if rehearsed is not None:
        return stop_lead_s(rehearsed.save_seconds or 0.0, max(rehearsed.seconds))
    return stop_lead_s(max((run.save_seconds for run in alike), default=0.0), 0.0)


def fit_line(costs: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, b) of seconds = a + b × cost, neither negative: the Theil–Sen line, which a few slow steps do not move.

    Proportional where no two costs differ.
    """
    pairs = list(zip(costs, seconds, strict=True))
    ratio = median(y / x for x, y in pairs)
    slopes = [(y - v) / (x - u) for (x, y), (u, v) in itertools.combinations(pairs, 2) if abs(x - u) > 1e-6 * x]
    if not slopes:
        return 0.0, ratio
    # Noise may tilt the line: no step gets faster by a longer text, or costs less than nothing at length 0.
    slope = min(max(median(slopes), 0.0), ratio)
    return max(0.0, median(y - slope * x for x, y in pairs)), slope
