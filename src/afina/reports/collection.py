"""One page about many runs: of a sweep or any folder, or of a comparison.

Runs whose recipes differ in the seed alone are one point: its mean over seeds and the interval of that mean are the headline, not its
luckiest seed, and the points are tested against the best as `afina sweep` does (`afina.statistics.points`). Curves of the best runs lie
over each other. The intervals of single runs cover the sampling of eval rows.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from afina.errors import AfinaError
from afina.files import read_json
from afina.recipe.metrics import SCALARS, lower_is_better, metric_range
from afina.reports.charts import Chart, points_of, smoothed
from afina.reports.compare import Comparison, Verdict, names_of, test_rows
from afina.reports.page import document, figures, note, pairs, seconds, table, tiles, warnings
from afina.run.directory import RunDir
from afina.statistics.intervals import mean_interval
from afina.statistics.label_quality import doubtful_rows
from afina.statistics.points import Row, ranked, remarks, useless
from afina.statistics.predictions import read_predictions
from afina.statistics.scores import Interval, score
from afina.statistics.weakness import weaknesses
from afina.text import number, p_value, plural
from afina.watch.reading import RunResult, differing, read_result

__all__ = ["collection_page", "comparison_page"]

#: The most runs in the chart of scores; whose curves are drawn; whose intervals are computed, which takes time.
_MOST_DRAWN, _MOST_CURVES, _MOST_SCORED = 60, 8, 200
#: Doubtful labels that are shown, and characters of a text.
_MOST_DOUBTFUL, _MOST_TEXT = 50, 300
#: Resamples per run; there are many runs.
_DRAWS = 1000

#: Keys in which the runs of one point differ.
_OF_ONE_POINT = ("name", "train.seed", "data.fold.number", "data.fold.repeat")

#: The charts of a page, and the page from their drawings.
Page = tuple[list[Chart], Callable[[Mapping[str, str]], str]]


def collection_page(folder: Path, paths: Sequence[Path], page: Path, *, texts: bool = True) -> Page:
    """The page of the runs below a folder. `paths` are run directories below `folder`; `page` is the folder of the page.

    Args:
        texts: show those of doubtful labels.
    """
    runs = [read_result(path) for path in paths]
    names = names_of(paths) if folder not in paths else [folder.name]
    metric = next((run.metric for run in runs if run.metric), None)
    intervals, weak, why = _intervals(runs, metric)
    order, record = _ranked(runs, metric), read_json(folder / "sweep.json")
    rows, best, seeds = _points(runs, names, metric, weak)
    search = isinstance(record.get("search"), Mapping)
    scores = [_scores(metric, {names[i]: intervals[i] for i in order if i in intervals})]
    curves, effects = _overlaid([runs[i] for i in order], [names[i] for i in order], metric), _effects(runs, metric)
    missing = sum(not _page_of(run).is_file() for run in runs)
    hint = f"{missing} of the runs have no page of their own yet: `afina report --each` writes them." if missing else ""

    def html(drawings: Mapping[str, str]) -> str:
        listed = _table(page, [(names[i], runs[i], intervals.get(i), weak.get(i)) for i in order], metric)
        body = [
            ("Points", _points_table(rows, best, metric) if seeds and not search else ""),
            ("Scores", figures(scores, drawings)),
            ("Effect of each hyperparameter", figures(effects, drawings)),
            ("Learning curves", figures(curves, drawings)),
            ("Runs", listed + note("; ".join(filter(None, (why, hint)))) if listed else ""),
            ("Doubtful labels", _doubtful(folder, any(row.weak for row in rows), texts=texts)),
            ("Sweep", _sweep(record)),
        ]
        models = {str(run.recipe.get("model")) for run in runs}
        about = (
            f"{plural(len(runs), 'run')}, {', '.join(sorted(models))}" if len(models) <= 3 else plural(len(runs), "run")
        )
        return document(folder.name, about, tiles(_lead(runs, rows, best, metric)), body, ("Sweep",))

    return [*scores, *effects, *curves], html


def _lead(
    runs: Sequence[RunResult], rows: Sequence[Row], best: Row | None, metric: str | None
) -> dict[str, tuple[str, str]]:
    """The figures at the top: the mean of the best point, not its luckiest seed."""
    lead: dict[str, tuple[str, str]] = {}
    if best is not None and best.interval is not None:
        mean, below = best.interval, best.point
        if mean.low is not None:
            below += f": mean of {mean.count} {_unit(best)}, 95 % interval {number(mean.low)} to {number(mean.high)}"
        lead[f"best {metric}"] = (number(mean.mean), below)
    elif any(row.weak for row in rows):
        lead[f"best {metric}"] = ("none", f"every model is of no use: {next(row.weak for row in rows if row.weak)}")
    lead["runs"] = (str(len(runs)), f"{sum(run.finished for run in runs)} finished")
    spent = sum(float(run.outcome.get("seconds") or 0) for run in runs)
    lead["wall time of all"] = (seconds(spent) or "–", "")
    return lead


def _scores(metric: str | None, spread: Mapping[str, Interval]) -> Chart:
    ranges = [(name, s.low, s.value, s.high) for name, s in spread.items()][:_MOST_DRAWN]
    words = "; ".join(f"{name}: {number(value)}" for name, _, value, _ in ranges)
    note = f"The best {_MOST_DRAWN} of {len(spread)}." if len(spread) > _MOST_DRAWN else ""
    title = f"{metric} of the runs, with 95 % intervals"
    return Chart("runs", title, x=metric or "", ranges=ranges, description=words, note=note)


def _overlaid(runs: Sequence[RunResult], names: Sequence[str], metric: str | None) -> list[Chart]:
    """Curves of several runs over each other: the score of each evaluation, the losses. Of the first `_MOST_CURVES` that have any."""
    logs: dict[str, list[dict[str, Any]]] = {}
    for run, name in zip(runs, names, strict=True):
        lines = [line for line in RunDir(run.path).lines("metrics.jsonl") if isinstance(line, dict)]
        if lines and len(logs) < _MOST_CURVES:
            logs[name] = lines
    note = f"The first {_MOST_CURVES} of {len(runs)} runs in the table." if len(runs) > _MOST_CURVES else ""
    charts = []
    for key, column, title in (
        ("curves-score", f"eval_{metric}", f"{metric} on eval by step"),
        ("curves-eval-loss", "eval_loss", "Validation loss by step"),
        ("curves-loss", "loss", "Training loss by step"),
    ):
        chart = Chart(key, title, note=note, lines={name: points_of(lines, column) for name, lines in logs.items()})
        charts.append(smoothed(chart, *chart.drawn))
    return charts


def _effects(runs: Sequence[RunResult], metric: str | None) -> list[Chart]:
    """The score by each hyperparameter that differs: one dot a run, and the mean of each value where values come again."""
    scored = [run for run in runs if metric and math.isfinite(run.metrics.get(metric, math.nan))]
    recipes = [run.flat_recipe() for run in scored]
    charts = []
    for key in differing(recipes) if len(scored) > 2 else []:
        pairs: list[tuple[Any, float]] = [
            (recipe.get(key), run.metrics[str(metric)]) for recipe, run in zip(recipes, scored, strict=True)
        ]
        values = sorted({value for value, _ in pairs if type(value) in (int, float)})
        if key in _OF_ONE_POINT or len(values) < 2 or any(type(value) not in (int, float) for value, _ in pairs):
            continue
        dots = [(float(value), y) for value, y in pairs]
        means = [(float(x), sum(of) / len(of)) for x in values if (of := [y for value, y in pairs if value == x])]
        means = means if len(values) < len(pairs) / 2 else []
        log = values[0] > 0 and values[-1] / values[0] >= 10
        words = "; ".join(f"{x:g}: mean {number(y)}" for x, y in means) or f"{plural(len(dots), 'run')}, one dot each"
        series: Any = {
            "dots": {"runs": dots},
            "lines": {"mean": means} if means else {},
            "log": log,
            "description": words,
        }
        series["ticks"] = values if len(values) <= 6 else ()
        charts.append(Chart(f"effect-{key}", f"{metric} by {key}", x=key, y=str(metric), **series))
    return charts


def _points(
    runs: Sequence[RunResult], names: Sequence[str], metric: str | None, weak: Mapping[int, str]
) -> tuple[list[Row], Row | None, bool]:
    """Runs that differ in the seed or the fold alone as one row, ranked and tested; the best; and whether any point has several runs."""
    recipes = [{k: v for k, v in run.flat_recipe().items() if k not in _OF_ONE_POINT} for run in runs]
    keys = differing(recipes)
    grouped: dict[str, list[int]] = {}
    for i, recipe in enumerate(recipes):
        grouped.setdefault(json.dumps(recipe, sort_keys=True, default=str), []).append(i)
    rows = []
    for group in grouped.values():
        scores = {i: runs[i].metrics.get(metric or "", math.nan) for i in group if runs[i].finished}
        values = {runs[i].fold or runs[i].train.get("seed", i): v for i, v in scores.items() if math.isfinite(v)}
        overlap = 1 / (of - 1) if (of := recipes[group[0]].get("data.fold.of")) else 0.0
        overrides = {key: str(_shown(recipes[group[0]].get(key))) for key in keys}
        words = ", ".join(f"{key}={value}" for key, value in zip(_short_keys(keys), overrides.values(), strict=True))
        rows.append(
            Row(
                names[group[0]] if len(group) == 1 else words or "the recipe",
                overrides,
                values,
                Counter(str(runs[i].outcome.get("outcome") or "no outcome").upper() for i in group),
                mean_interval(list(values.values()), overlap=overlap, within=metric_range(metric or ""))
                if values
                else None,
                weak=weak[group[0]] if values and all(i in weak for i in group) else "",
                overlap=overlap,
            )
        )
    lower = bool(metric and lower_is_better(metric, runs[0].metric_texts))
    ordered, best = ranked(rows, lower)
    return ordered, best, any(len(group) > 1 for group in grouped.values())


def _points_table(rows: Sequence[Row], best: Row | None, metric: str | None) -> str:
    """The sweep's own table: means, intervals, differences to the best and their p-values."""
    cells = []
    for row in rows:
        mean, against = row.interval, row.against_best.difference if row.against_best else None
        beside = f" ({against.low:+.4f} to {against.high:+.4f})" if against and against.low is not None else ""
        cells.append(
            [
                row.point,
                number(mean.mean) if mean else None,
                f"{number(mean.low)}–{number(mean.high)}" if mean and mean.low is not None else None,
                f"{len(row.values)}/{row.runs}",
                "best" if row is best else f"{against.mean:+.4f}{beside}" if against else None,
                None if row is best or row.p is None else p_value(row.p),
            ]
        )
    heads = ["point", f"mean {metric or 'score'}", "95 % interval", _unit(rows[0]), "against the best", "p (Holm)"]
    weak = [f"{row.point}: the model {row.weak}." for row in rows if row.weak]
    about = [*map(note, useless(rows) or remarks(rows, best)), *([] if useless(rows) else [warnings(weak)])]
    return table(heads, cells, f"Means over {_unit(rows[0])}, the best first") + "".join(about)


def _unit(row: Row) -> str:
    if not row.overlap:
        return "seeds"
    return "folds × repeats" if len(row.values) > round(1 / row.overlap) + 1 else "folds"


def comparison_page(found: Comparison, tests: Sequence[Verdict] | None, looked: str = "") -> Page:
    """The page of `afina compare`: scores, tests, curves, what differs."""
    metric = next((run.metric for run in found.runs if run.metric), None)
    intervals, weak, why = _intervals(found.runs, metric, found.split)
    scores = [_scores(metric, {found.names[i]: interval for i, interval in intervals.items()})]
    curves, effects = _overlaid(found.runs, found.names, metric), _effects(found.runs, metric)

    def beside(rows: Mapping[str, Sequence[Any]], shown: Callable[[Any], Any], caption: str) -> str:
        if len(found.runs) <= 4:
            return table(["", *found.names], [[key, *map(shown, values)] for key, values in rows.items()], caption)
        listed = [[name, *(shown(values[i]) for values in rows.values())] for i, name in enumerate(found.names)]
        return table(["run", *rows], listed, caption) if rows else ""

    def html(drawings: Mapping[str, str]) -> str:
        lines = [f"{name}: {line}" for name, run in zip(found.names, found.runs, strict=True) for line in run.warnings]
        lines += [f"{found.names[i]}: the model {reason}" for i, reason in weak.items()]
        same = "" if found.recipe else note("The recipes are the same.")
        heads, rows, others = test_rows(tests) if tests else ([], [], [])
        for before, row in itertools.pairwise(rows):  # a row that is sorted elsewhere keeps its run
            row[0] = row[0] or before[0]
        body = [
            ("Scores", figures(scores, drawings) + beside(found.metrics, number, f"On {found.split}") + note(why)),
            (
                "Tests",
                table(heads, rows, "Paired, on the same rows") + "".join(map(note, others)) if tests else "",
            ),
            ("Learning curves", figures(curves, drawings)),
            ("Differences between the recipes", same + beside(found.recipe, _shown, "Keys that differ")),
            ("Effect of each hyperparameter", figures(effects, drawings)),
            ("Runs", beside(found.about, _shown, "How they ran")),
        ]
        lead = (note(looked) if looked else "") + warnings(lines)
        return document("Comparison", ", ".join(found.names[:6]) + (" …" if len(found.names) > 6 else ""), lead, body)

    return [*scores, *curves, *effects], html


def _short_keys(keys: Sequence[str]) -> list[str]:
    """The last parts of the keys, where these differ."""
    short = [key.rpartition(".")[2] for key in keys]
    return short if len(set(short)) == len(short) else list(keys)


def _page_of(run: RunResult) -> Path:
    return run.path / "report/index.html"


def _table(page: Path, runs: Sequence[tuple[str, RunResult, Interval | None, str | None]], metric: str | None) -> str:
    """One row per run: what differs in its recipe, how it ended, its score with an interval."""
    recipes = [run.flat_recipe() for _, run, *_ in runs]
    keys = differing(recipes)
    rows, links = [], {}
    for (name, run, interval, _), recipe in zip(runs, recipes, strict=True):
        if _page_of(run).is_file():
            links[name] = quote(os.path.relpath(_page_of(run).absolute(), page.absolute()))
        value = run.metrics.get(metric) if metric else None
        known = interval is not None and interval.low == interval.low
        rows.append(
            [
                name,
                *(_shown(recipe.get(key)) for key in keys),
                run.outcome.get("outcome") or "no outcome",
                number(value),
                f"{number(interval.low)}–{number(interval.high)}" if interval and known else None,
                run.outcome.get("global_step"),
                seconds(run.outcome.get("seconds")),
                run.outcome.get("samples_per_second"),
            ]
        )
    heads = [
        "run",
        *_short_keys(keys),
        "outcome",
        metric or "score",
        "95 % interval",
        "steps",
        "wall time",
        "examples/s",
    ]
    weak = {name: f"the model {reason}" for name, *_, reason in runs if reason}
    return table(heads, rows, "The best first", links=links, remarks=weak)


def _doubtful(folder: Path, useless: bool, *, texts: bool) -> str:
    """The rows of a cross-validation whose label is probably wrong, from the table that `afina sweep` has written."""
    try:
        rows = doubtful_rows(read_predictions(folder / "out_of_fold.parquet"))
    except AfinaError:
        return ""
    if not rows:
        return ""
    heads = ["file", "row", *(["text"] if texts else []), "label", "suggested", "probability", "issue"]
    cells = [[(row.get(head) or "")[:_MOST_TEXT] for head in heads] for row in rows[:_MOST_DOUBTFUL]]
    caution = "The models are of no use (see above), and so are their doubts. " if useless else ""
    return table(heads, cells, "The most doubtful first") + note(
        f"{caution}"
        "By confident learning (Northcutt, Jiang and Chuang 2021) from the probabilities out of fold; probability: of the label as given. An issue: another label passes its "
        "own mean probability. All of them, with a column to correct, are in doubtful_labels.csv."
    )


def _sweep(record: Mapping[str, Any]) -> str:
    """The grid and the seeds, or the space of a search, from `sweep.json`."""
    grid, search = record.get("grid"), record.get("search")
    rows = {str(key): _shown(values) for key, values in grid.items()} if isinstance(grid, Mapping) else {}
    rows |= {"seeds": _shown(record.get("seeds") or None), "folds": record.get("folds")}
    rows |= {"repeats": record.get("repeats")} if record.get("folds") else {}
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


def _intervals(
    runs: Sequence[RunResult], metric: str | None, split: str = "eval"
) -> tuple[dict[int, Interval], dict[int, str], str]:
    """By index of a run: the interval of its score, and why its model is of no use; and the reason why some have no interval."""
    if metric is None:
        return {}, {}, ""
    if len(runs) > _MOST_SCORED:
        return {}, {}, f"Intervals are left out for more than {_MOST_SCORED} runs"
    intervals: dict[int, Interval] = {}
    weak: dict[int, str] = {}
    why = ""
    for at, run in enumerate(runs):
        if metric not in run.metrics:
            continue
        try:
            predictions = read_predictions(RunDir(run.path).predictions_of(split), texts=False)
        except AfinaError as error:
            why = str(error)
            continue
        if reasons := weaknesses(predictions, metric):
            weak[at] = reasons[0]
        scores = score(predictions, _DRAWS, [metric]) if metric in SCALARS else None
        if scores and metric in scores.overall:
            intervals[at] = scores.overall[metric]
    return intervals, weak, why


def _shown(value: object) -> object:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value) if isinstance(value, dict | int) else value
