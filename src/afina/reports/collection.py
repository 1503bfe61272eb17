"""One page about many runs, of a sweep or any folder: differences of recipes, outcomes, scores with intervals.

Runs whose recipes differ in the seed alone are one point: its mean over seeds and the interval of that mean are the headline, not its
luckiest seed. The intervals of single runs cover the sampling of eval rows. Not covered: tests between points (`afina sweep`) and between
runs (`afina compare`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from afina.errors import AfinaError
from afina.files import read_json
from afina.recipe.metrics import SCALARS, lower_is_better
from afina.reports.charts import Chart
from afina.reports.compare import differing, names_of
from afina.reports.page import document, figure, note, pairs, seconds, table, tiles
from afina.statistics.intervals import MeanInterval, mean_interval
from afina.statistics.predictions import read_predictions
from afina.statistics.scores import Interval, score
from afina.statistics.weakness import weaknesses
from afina.watch.reading import RunResult, read_result

__all__ = ["collection_page"]

#: The most runs in the chart; the most whose intervals are computed, which takes time.
_MOST_DRAWN = 60
_MOST_SCORED = 200
#: Resamples per run; there are many runs.
_DRAWS = 1000


@dataclass(frozen=True)
class _Point:
    """Runs that differ in the seed alone: their name, indices, mean over those that have finished; why all are of no use."""

    name: str
    runs: tuple[int, ...]
    mean: MeanInterval | None
    weak: str


def collection_page(folder: Path, paths: Sequence[Path], page: Path) -> tuple[str, list[Chart]]:
    """The page and its charts. `paths` are run directories below `folder`; `page` is the folder of the page."""
    runs = [read_result(path) for path in paths]
    names = names_of(paths) if folder not in paths else [folder.name]
    metric = next((run.metric for run in runs if run.metric), None)
    intervals, weak, why = _intervals(runs, metric)
    order, points = _ranked(runs, metric), _points(runs, names, metric, weak)
    seeds = any(len(point.runs) > 1 for point in points)
    spread = {names[i]: intervals[i] for i in order if i in intervals}
    chart = Chart(
        "runs",
        f"{metric} of the runs, with 95 % intervals",
        x=metric or "",
        ranges=[(name, s.low, s.value, s.high) for name, s in spread.items()][:_MOST_DRAWN],
        description="; ".join(f"{name}: {s.value:.4f}" for name, s in spread.items()) + ".",
    )
    finished = sum(run.finished for run in runs)
    lead = {"runs": (str(len(runs)), f"{finished} finished")}
    if metric and points and points[0].mean is not None and not points[0].weak:
        best, below = points[0].mean, points[0].name
        if best.low is not None and best.high is not None:
            below += f": mean of {best.count} seeds, 95 % interval {best.low:.4f} to {best.high:.4f}"
        lead[f"best {metric}"] = (f"{best.mean:.4f}", below)
    elif points and points[0].weak:
        lead[f"best {metric}"] = ("none", f"every model is of no use: {points[0].weak}")
    spent = sum(float(run.outcome.get("seconds") or 0) for run in runs)
    lead["wall time of all"] = (seconds(spent) or "–", "")
    missing = sum(not _page_of(run).is_file() for run in runs)
    hint = f"{missing} of the runs have no page of their own yet: `afina report --each` writes them." if missing else ""
    listed = _table(page, [(names[i], runs[i], intervals.get(i), weak.get(i)) for i in order], metric)
    body = [
        ("Points", _points_table(points, metric) if seeds else ""),
        ("Runs", listed + note("; ".join(filter(None, (why, hint)))) if listed else ""),
        ("Scores", figure(chart)),
        ("Sweep", _sweep(read_json(folder / "sweep.json"))),
    ]
    models = {str(run.recipe.get("model")) for run in runs}
    about = f"{len(runs)} runs, {', '.join(sorted(models))}" if len(models) <= 3 else f"{len(runs)} runs"
    return document(folder.name, about, tiles(lead), body), [chart]


def _points(
    runs: Sequence[RunResult], names: Sequence[str], metric: str | None, weak: Mapping[int, str]
) -> list[_Point]:
    """The best first: complete points before incomplete ones, models of no use and points without a score last."""
    recipes = [{k: v for k, v in run.flat_recipe().items() if k not in ("name", "train.seed")} for run in runs]
    keys = differing(recipes)
    grouped: dict[str, list[int]] = {}
    for i, recipe in enumerate(recipes):
        grouped.setdefault(json.dumps(recipe, sort_keys=True, default=str), []).append(i)
    sign = 1 if metric and lower_is_better(metric, runs[0].metric_texts) else -1
    points, ranks = [], {}
    for group in grouped.values():
        values = {i: runs[i].metrics[metric] for i in group if metric and metric in runs[i].metrics}
        known = [value for value in values.values() if math.isfinite(value)]
        mean = mean_interval(known) if known else None
        words = ", ".join(f"{key.rpartition('.')[2]}={_shown(recipes[group[0]].get(key))}" for key in keys)
        name = names[group[0]] if len(group) == 1 else words or "the recipe"
        useless = weak[group[0]] if values and all(i in weak for i in values) else ""
        point = _Point(name, tuple(group), mean, useless)
        points.append(point)
        ranks[point] = (mean is None, bool(useless), len(values) < len(group), sign * mean.mean if mean else 0.0)
    return sorted(points, key=lambda point: ranks[point])


def _points_table(points: Sequence[_Point], metric: str | None) -> str:
    rows = [
        [
            point.name,
            f"{point.mean.mean:.4f}" if point.mean else None,
            f"{point.mean.low:.4f}–{point.mean.high:.4f}" if point.mean and point.mean.low is not None else None,
            f"{point.mean.count if point.mean else 0}/{len(point.runs)}",
            point.weak or None,
        ]
        for point in points
    ]
    if not any(row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    heads = ["point", f"mean {metric or 'score'}", "95 % interval", "seeds", "remark"][: len(rows[0])]
    return table(heads, rows, "Means over seeds, the best first; intervals by Student's t") + note(
        "The best was chosen by these numbers: confirm it with new seeds. `afina sweep SWEEP` tests the points against each other."
    )


def _page_of(run: RunResult) -> Path:
    return run.path / "report/index.html"


def _table(page: Path, runs: Sequence[tuple[str, RunResult, Interval | None, str | None]], metric: str | None) -> str:
    """One row per run: what differs in its recipe, how it ended, its score with an interval."""
    recipes = [run.flat_recipe() for _, run, *_ in runs]
    remarks = any(weak for *_, weak in runs)
    keys = differing(recipes)
    rows, links = [], {}
    for (name, run, interval, weak), recipe in zip(runs, recipes, strict=True):
        if _page_of(run).is_file():
            links[name] = quote(os.path.relpath(_page_of(run).absolute(), page.absolute()))
        value = run.metrics.get(metric) if metric else None
        rows.append(
            [
                name,
                *(_shown(recipe.get(key)) for key in keys),
                run.outcome.get("outcome") or "no outcome",
                None if value is None else f"{value:.4f}",
                f"{interval.low:.4f}–{interval.high:.4f}" if interval and interval.low == interval.low else None,
                run.outcome.get("global_step"),
                seconds(run.outcome.get("seconds")),
                run.outcome.get("samples_per_second"),
                *([weak] if remarks else []),
            ]
        )
    heads = ["run", *keys, "outcome", metric or "score", "95 % interval", "steps", "wall time", "examples/s"]
    heads += ["remark"] if remarks else []
    return table(heads, rows, "The best first", links=links)


def _sweep(record: Mapping[str, Any]) -> str:
    """The grid and the seeds, or the space of a search, from `sweep.json`."""
    grid, search = record.get("grid"), record.get("search")
    rows = {str(key): _shown(values) for key, values in grid.items()} if isinstance(grid, Mapping) else {}
    rows |= {"seeds": _shown(record.get("seeds") or None)}
    if isinstance(search, Mapping):
        rows |= {key: _shown(search[key]) for key in ("metric", "direction", "trials", "space") if key in search}
    return pairs(rows)


def _ranked(runs: Sequence[RunResult], metric: str | None) -> list[int]:
    """Indices of the runs, the best first; runs without the score last, in their own order."""
    sign = 1 if metric and lower_is_better(metric, runs[0].metric_texts) else -1
    return sorted(
        range(len(runs)),
        key=lambda i: (0, sign * runs[i].metrics[metric]) if metric and metric in runs[i].metrics else (1, 0.0),
    )


def _intervals(runs: Sequence[RunResult], metric: str | None) -> tuple[dict[int, Interval], dict[int, str], str]:
    """By index of a run: the interval of its score, and why its model is of no use; and the reason why some have no interval."""
    if metric is None:
        return {}, {}, ""
    if len(runs) > _MOST_SCORED:
        return {}, {}, f"Intervals are left out for more than {_MOST_SCORED} runs"
    intervals: dict[int, Interval] = {}
    weak: dict[int, str] = {}
    why = ""
    for number, run in enumerate(runs):
        if metric not in run.metrics:
            continue
        try:
            predictions = read_predictions(run.path / "predictions.parquet", texts=False)
        except AfinaError as error:
            why = str(error)
            continue
        if reasons := weaknesses(predictions, metric):
            weak[number] = reasons[0]
        scores = score(predictions, _DRAWS, [metric]) if metric in SCALARS else None
        if scores and metric in scores.overall:
            intervals[number] = scores.overall[metric]
    return intervals, weak, why


def _shown(value: object) -> object:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value) if isinstance(value, dict) else value
