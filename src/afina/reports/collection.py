"""One page about many runs, a sweep's or any folder's: what differs between their recipes, how each ended, its score with an interval.

The interval is that of the rows that it was evaluated on. Means over seeds and whether the best cell is better than the next are what `afina sweep`
says; two runs on the same rows are tested against each other by `afina compare`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from afina.errors import AfinaError
from afina.reports.charts import Chart
from afina.reports.facts import read_json
from afina.reports.page import document, figure, note, pairs, seconds, table, tiles
from afina.statistics.predictions import read_predictions
from afina.statistics.scores import Interval, score
from afina.watch.glance import Glance, differing, glance, names_of

__all__ = ["collection_page"]

#: More runs than this are not drawn, and their intervals take too long.
_MOST_DRAWN = 60
_MOST_SCORED = 200
#: Resamples per run; there are many runs.
_DRAWS = 1000


def collection_page(folder: Path, paths: Sequence[Path]) -> tuple[str, list[Chart]]:
    """The page and its charts. `paths` are run directories below `folder`."""
    runs = [glance(path) for path in paths]
    names = names_of(paths) if folder not in paths else [folder.name]
    keys = differing(runs)
    metric = next((run.metric for run in runs if run.metric), None)
    intervals, why = _intervals(runs, metric)
    order = _ranked(runs, metric)
    rows, links = [], {}
    for i in order:
        run, found = runs[i], intervals.get(i)
        value = run.metrics.get(metric) if metric else None
        page = run.path / "report/index.html"
        if page.is_file():
            links[names[i]] = quote(os.path.relpath(page, folder / "report"))
        shown = None if value is None else f"{value:.4f}"
        spread = f"{found.low:.4f}–{found.high:.4f}" if found else None
        speed = run.outcome.get("samples_per_second")
        rows.append(
            [
                names[i],
                *(_shown(run.recipe.get(key)) for key in keys),
                run.state,
                shown,
                spread,
                run.outcome.get("global_step"),
                seconds(run.outcome.get("seconds")),
                speed,
            ]
        )
    heads = ["run", *keys, "outcome", metric or "score", "95 % interval", "steps", "wall time", "examples/s"]
    chart = Chart(
        "runs",
        f"{metric} of the runs, with 95 % intervals",
        x=metric or "",
        ranges=[(names[i], intervals[i].low, intervals[i].value, intervals[i].high) for i in order if i in intervals][
            :_MOST_DRAWN
        ],
        said="; ".join(f"{names[i]}: {intervals[i].value:.4f}" for i in order if i in intervals) + ".",
    )
    finished = sum(run.state == "finished" for run in runs)
    best = next((i for i in order if metric and metric in runs[i].metrics), None)
    lead = {"runs": (str(len(runs)), f"{finished} finished")}
    if best is not None and metric:
        lead[f"best {metric}"] = (f"{runs[best].metrics[metric]:.4f}", names[best])
    spent = sum(float(run.outcome.get("seconds") or 0) for run in runs)
    lead["wall time of all"] = (seconds(spent) or "–", "")
    without = sum(not (run.path / "report/index.html").is_file() for run in runs)
    hint = f"{without} of the runs have no page of their own yet: `afina report --each` writes them." if without else ""
    body = [
        (
            "Runs",
            table(heads, rows, "The best first", links=links) + note("; ".join(filter(None, (why, hint))))
            if rows
            else "",
        ),
        ("Scores", figure(chart)),
        ("Sweep", _sweep(read_json(folder / "sweep.json"))),
    ]
    common = {str(run.recipe.get("model")) for run in runs}
    about = f"{len(runs)} runs, {', '.join(sorted(common))}" if len(common) <= 3 else f"{len(runs)} runs"
    return document(folder.name, about, tiles(lead), body), [chart]


def _sweep(record: Mapping[str, Any]) -> str:
    """The grid and the seeds, or the space of a search, as `sweep.json` says."""
    grid, search = record.get("grid"), record.get("search")
    rows = {str(key): _shown(values) for key, values in grid.items()} if isinstance(grid, Mapping) else {}
    rows |= {"seeds": _shown(record.get("seeds") or None)}
    if isinstance(search, Mapping):
        rows |= {key: _shown(search[key]) for key in ("metric", "direction", "trials", "space") if key in search}
    return pairs(rows)


def _ranked(runs: Sequence[Glance], metric: str | None) -> list[int]:
    """The best first; runs without the score last, in their own order."""
    sign = 1 if metric in ("mse", "mae", "loss") else -1
    return sorted(
        range(len(runs)),
        key=lambda i: (0, sign * runs[i].metrics[metric]) if metric and metric in runs[i].metrics else (1, 0.0),
    )


def _intervals(runs: Sequence[Glance], metric: str | None) -> tuple[dict[int, Interval], str]:
    """Run -> interval of its score, and in words why some have none."""
    if metric is None:
        return {}, ""
    if len(runs) > _MOST_SCORED:
        return {}, f"Intervals are left out for more than {_MOST_SCORED} runs"
    found: dict[int, Interval] = {}
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
            found[number] = scores.overall[metric]
    return found, why


def _shown(value: object) -> object:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value) if isinstance(value, dict) else value
