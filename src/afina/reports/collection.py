"""One page about many runs, of a sweep or any folder: differences of recipes, outcomes, scores with intervals.

The intervals cover the sampling of eval rows. Not covered: means over seeds (`afina sweep`) and tests between runs (`afina compare`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from afina.errors import AfinaError
from afina.files import read_json
from afina.recipe.metrics import lower_is_better
from afina.reports.charts import Chart
from afina.reports.compare import differing, names_of
from afina.reports.page import document, figure, note, pairs, seconds, table, tiles
from afina.statistics.predictions import read_predictions
from afina.statistics.scores import Interval, score
from afina.watch.reading import RunResult, read_result

__all__ = ["collection_page"]

#: The most runs in the chart; the most whose intervals are computed, which takes time.
_MOST_DRAWN = 60
_MOST_SCORED = 200
#: Resamples per run; there are many runs.
_DRAWS = 1000


def collection_page(folder: Path, paths: Sequence[Path]) -> tuple[str, list[Chart]]:
    """The page and its charts. `paths` are run directories below `folder`."""
    runs = [read_result(path) for path in paths]
    names = names_of(paths) if folder not in paths else [folder.name]
    metric = next((run.metric for run in runs if run.metric), None)
    intervals, why = _intervals(runs, metric)
    order = _ranked(runs, metric)
    spread = {names[i]: intervals[i] for i in order if i in intervals}
    chart = Chart(
        "runs",
        f"{metric} of the runs, with 95 % intervals",
        x=metric or "",
        ranges=[(name, s.low, s.value, s.high) for name, s in spread.items()][:_MOST_DRAWN],
        description="; ".join(f"{name}: {s.value:.4f}" for name, s in spread.items()) + ".",
    )
    finished = sum(run.finished for run in runs)
    best = next((i for i in order if metric and metric in runs[i].metrics), None)
    lead = {"runs": (str(len(runs)), f"{finished} finished")}
    if best is not None and metric:
        lead[f"best {metric}"] = (f"{runs[best].metrics[metric]:.4f}", names[best])
    spent = sum(float(run.outcome.get("seconds") or 0) for run in runs)
    lead["wall time of all"] = (seconds(spent) or "–", "")
    missing = sum(not _page_of(run).is_file() for run in runs)
    hint = f"{missing} of the runs have no page of their own yet: `afina report --each` writes them." if missing else ""
    listed = _table(folder, [(names[i], runs[i], intervals.get(i)) for i in order], metric)
    body = [
        ("Runs", listed + note("; ".join(filter(None, (why, hint)))) if listed else ""),
        ("Scores", figure(chart)),
        ("Sweep", _sweep(read_json(folder / "sweep.json"))),
    ]
    models = {str(run.recipe.get("model")) for run in runs}
    about = f"{len(runs)} runs, {', '.join(sorted(models))}" if len(models) <= 3 else f"{len(runs)} runs"
    return document(folder.name, about, tiles(lead), body), [chart]


def _page_of(run: RunResult) -> Path:
    return run.path / "report/index.html"


def _table(folder: Path, runs: Sequence[tuple[str, RunResult, Interval | None]], metric: str | None) -> str:
    """One row per run: what differs in its recipe, how it ended, its score with an interval."""
    recipes = [run.flat_recipe() for _, run, _ in runs]
    keys = differing(recipes)
    rows, links = [], {}
    for (name, run, interval), recipe in zip(runs, recipes, strict=True):
        if _page_of(run).is_file():
            links[name] = quote(os.path.relpath(_page_of(run), folder / "report"))
        value = run.metrics.get(metric) if metric else None
        rows.append(
            [
                name,
                *(_shown(recipe.get(key)) for key in keys),
                run.outcome.get("outcome") or "no outcome",
                None if value is None else f"{value:.4f}",
                f"{interval.low:.4f}–{interval.high:.4f}" if interval else None,
                run.outcome.get("global_step"),
                seconds(run.outcome.get("seconds")),
                run.outcome.get("samples_per_second"),
            ]
        )
    heads = ["run", *keys, "outcome", metric or "score", "95 % interval", "steps", "wall time", "examples/s"]
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
    sign = 1 if metric and lower_is_better(metric) else -1
    return sorted(
        range(len(runs)),
        key=lambda i: (0, sign * runs[i].metrics[metric]) if metric and metric in runs[i].metrics else (1, 0.0),
    )


def _intervals(runs: Sequence[RunResult], metric: str | None) -> tuple[dict[int, Interval], str]:
    """Index of a run -> interval of its score; and the reason why some have none."""
    if metric is None:
        return {}, ""
    if len(runs) > _MOST_SCORED:
        return {}, f"Intervals are left out for more than {_MOST_SCORED} runs"
    intervals: dict[int, Interval] = {}
    why = ""
    for number, run in enumerate(runs):
        if metric not in run.metrics:
            continue
        try:
            scores = score(read_predictions(run.path / "predictions.parquet"), _DRAWS)
        except AfinaError as error:
            why = str(error)
            continue
        if metric in scores.overall:
            intervals[number] = scores.overall[metric]
    return intervals, why


def _shown(value: object) -> object:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value) if isinstance(value, dict) else value
