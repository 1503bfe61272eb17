"""One page about one run: `<run>/report/index.html`, self-contained, from the files of the run directory alone.

Reads what is there and leaves out what is not: a run that failed, or is still training, has a page too. The page fetches
nothing and runs no script; its curves are SVG with a title and a description. Names of the site's account and the
environment are left out, so that it can be shared. It does not compare runs.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, EnvironmentProblem, InputError
from afina.plan import Plan
from afina.rundir import Outcome, RunDir, is_run_dir, write_atomic

__all__ = ["main", "write_report"]

Point = tuple[float, float]

#: Metrics that are errors: they have no upper bound, and get a chart of their own.
_ERRORS = ("mse", "mae")
#: Colours of the lines in light and dark; each line has a dash pattern and a marker's label of its own too.
_STROKES = ("var(--line-1)", "var(--line-2)", "var(--line-3)", "var(--line-4)", "var(--line-5)")
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2")

_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #5c6670; --page: #fff; --rule: #d5dade; --cell: 26, 93, 171;
  --line-1: #1a5dab; --line-2: #b3470b; --line-3: #2a7a3b; --line-4: #8a3c9c; --line-5: #6a5a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --soft: #a3adb6; --page: #15181b; --rule: #3a4147;
  --cell: 96, 165, 250; --line-1: #7db4f5; --line-2: #f2a272; --line-3: #84cf95; --line-4: #d7a0e4; --line-5: #d9c85e; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--rule); }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } .numbers td, .numbers thead th { text-align: right; font-variant-numeric: tabular-nums; }
.numbers { display: block; overflow-x: auto; } caption { text-align: left; color: var(--soft); }
.matrix td { padding: .4rem .8rem; border: 1px solid var(--rule); }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--rule); font-size: 14px; }
svg { width: 100%; height: auto; } svg text { fill: var(--text); font: 13px system-ui, sans-serif; } .soft { color: var(--soft); }
"""


def write_report(run_dir: str | Path) -> Path:
    """Write the page of a run; returns its path. An older page is replaced.

    Raises:
        InputError: not a run directory, or its plan cannot be read.
        EnvironmentProblem: the page cannot be written.
    """
    if not is_run_dir(run_dir):
        raise InputError(
            f"{run_dir}: not a run directory", "give the folder that `afina train` or `afina submit` named"
        )
    run = RunDir(run_dir)
    text = _page(run, run.plan())
    folder = run.path / "report"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{folder}: {error.strerror}", "free space or correct the permissions") from None
    write_atomic(folder / "index.html", text)
    return folder / "index.html"


def _page(run: RunDir, plan: Plan) -> str:
    outcome = run.outcome()
    prepared = _json(run.path / "prepared.json")
    labels = (outcome.labels if outcome else None) or prepared.get("labels") or []
    metrics = outcome.metrics if outcome else {}
    evaluations = [line for line in run.metrics() if "eval_loss" in line]
    sections = [
        ("Outcome", _outcome(run, outcome)),
        ("Epochs", _epochs(run.metrics())),
        ("Loss", _loss_chart(run.metrics(), evaluations)),
        ("Metrics", _metric_charts(evaluations)),
        ("Each class", "".join(_per_class(metrics, part, labels) for part in ("eval", "test"))),
        ("Confusion matrix", "".join(_confusion(metrics, part, labels) for part in ("eval", "test"))),
        ("Data", _data(prepared)),
        ("Plan", _plan(plan)),
        ("Attempts", _attempts(run)),
        ("Recipe", _recipe(run)),
    ]
    body = "\n".join(f"<section><h2>{escape(title)}</h2>\n{html}</section>" for title, html in sections if html)
    name = escape(plan.recipe.name)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name} – afina</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{name}</h1>\n"
        f'<p class="soft">{escape(plan.recipe.model)}, afina {escape(plan.afina_version)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )


# -- sections ---------------------------------------------------------------------------------------------------------


def _outcome(run: RunDir, outcome: Outcome | None) -> str:
    if outcome is None:
        return "<p>No outcome is recorded: the run has not ended, or was never started.</p>"
    rows: dict[str, Any] = {
        "outcome": outcome.outcome,
        "steps": f"{outcome.global_step}" + (f" of {outcome.max_steps}" if outcome.max_steps else ""),
        "weights in model/": f"step {outcome.model_step}" if outcome.model_step else None,
        "task": outcome.task,
        "training examples per second": outcome.samples_per_second,
        "seconds, all attempts": outcome.seconds,
        "attempts": outcome.attempts,
        "processes": outcome.world_size,
        "device": outcome.device,
        **{k: v for k, v in outcome.metrics.items() if isinstance(v, int | float)},
    }
    error = f"<h3>What failed</h3><pre>{escape(outcome.error)}</pre>" if outcome.error else ""
    return _pairs(rows) + error


def _epochs(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table that the run prints at its end: one row per evaluation, with the training loss logged last before it."""
    names = list(dict.fromkeys(k for line in lines if "eval_loss" in line for k in _scalars(line)))
    rows, loss = [], None
    for line in lines:
        loss = line.get("loss", loss)
        if "eval_loss" in line:
            rows.append([line.get("epoch"), line.get("step"), loss, line["eval_loss"], *(line.get(n) for n in names)])
    heads = ["epoch", "step", "training loss", "validation loss", *(n.removeprefix("eval_") for n in names)]
    return _table(heads, rows, "One row per evaluation") if rows else ""


def _loss_chart(lines: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    series = {"training": _points(lines, "loss"), "validation": _points(evaluations, "eval_loss")}
    return _chart("loss", "Loss by step", series)


def _metric_charts(evaluations: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(k for line in evaluations for k in _scalars(line)))
    errors = [n for n in names if n.removeprefix("eval_") in _ERRORS]
    scores = [n for n in names if n not in errors]

    def series(chosen: Iterable[str]) -> dict[str, list[Point]]:
        return {n.removeprefix("eval_"): _points(evaluations, n) for n in chosen}

    return _chart("metrics", "Metrics by step", series(scores)) + _chart("errors", "Errors by step", series(errors))


def _per_class(metrics: Mapping[str, Any], part: str, labels: Sequence[str]) -> str:
    columns = {
        name: metrics[f"{part}_{name}_per_class"]
        for name in ("f1", "precision", "recall")
        if isinstance(metrics.get(f"{part}_{name}_per_class"), list)
    }
    if not columns:
        return ""
    rows = [
        [_label(labels, i), *(values[i] for values in columns.values())]
        for i in range(min(len(v) for v in columns.values()))
    ]
    return _table(["class", *columns], rows, f"On {part}, the model in model/")


def _confusion(metrics: Mapping[str, Any], part: str, labels: Sequence[str]) -> str:
    matrix = metrics.get(f"{part}_confusion_matrix")
    if not matrix:
        return ""
    heads = "".join(f'<th scope="col">{escape(_label(labels, i))}</th>' for i in range(len(matrix)))
    rows = []
    for i, row in enumerate(matrix):
        total = sum(row) or 1
        cells = "".join(f'<td style="background: rgba(var(--cell), {0.5 * n / total:.3f})">{n:d}</td>' for n in row)
        rows.append(f'<tr><th scope="row">{escape(_label(labels, i))}</th>{cells}</tr>')
    caption = f"On {part}: rows are the labels, columns the predictions; darker is a larger share of the row"
    return (
        f'<table class="numbers matrix"><caption>{caption}</caption><thead><tr><th scope="col">label</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _data(prepared: Mapping[str, Any]) -> str:
    if not prepared:
        return ""
    tokens = prepared.get("tokens") or {}
    rows = [[part, count, tokens.get(part)] for part, count in (prepared.get("rows") or {}).items()]
    warnings = "".join(f"<li>{escape(str(w))}</li>" for w in prepared.get("warnings") or [])
    return (
        (_table(["part", "rows", "tokens"], rows, "") if rows else "")
        + _pairs(
            {
                "labels": ", ".join(map(str, prepared.get("labels") or [])) or None,
                "data commit": prepared.get("data_commit"),
                "model commit": prepared.get("model_commit"),
                "prepared": prepared.get("prepared"),
            }
        )
        + (f"<h3>Warnings</h3><ul>{warnings}</ul>" if warnings else "")
    )


def _plan(plan: Plan) -> str:
    geometry, resources = plan.geometry, plan.recipe.resources
    return _pairs(
        {
            "digest": plan.digest,
            "nodes": geometry.nodes,
            "processes per node": geometry.processes_per_node,
            "GPUs per node": geometry.gpus_per_node,
            "CPUs per process": geometry.cpus_per_process,
            "global batch": f"{geometry.global_batch} = {geometry.batch_per_device} per device × {geometry.accumulation} accumulated × "
            f"{geometry.num_processes} processes",
            "time limit, minutes": resources.time,
            "image": plan.site.image,
            "runtime": plan.site.runtime,
        }
    )


def _attempts(run: RunDir) -> str:
    rows = []
    for name in run.attempt_names():
        facts = _json(run.attempts / name / "env.json")
        geometry = facts.get("geometry") or {}
        try:
            code = (run.attempts / name / "exit").read_text().strip()
        except OSError:
            code = None
        processes = geometry.get("nodes", 0) * geometry.get("processes_per_node", 0) or None
        rows.append([name, _time(facts.get("started")), facts.get("host"), processes, facts.get("python"), code])
    return _table(["attempt", "started", "first host", "processes", "Python", "exit code"], rows, "") if rows else ""


def _recipe(run: RunDir) -> str:
    try:
        return f"<pre>{escape((run.path / 'recipe.yaml').read_text(encoding='utf-8', errors='replace'))}</pre>"
    except OSError:
        return ""


# -- pieces -----------------------------------------------------------------------------------------------------------


def _chart(key: str, title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Lines over steps, as one SVG; an empty string where there is nothing to draw."""
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    left, right, top, bottom = 64, 700, 34, 250
    low, high = min(ys), max(ys)
    if high == low:
        low, high = low - 0.5, high + 0.5
    first, last = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return left + across * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    parts, said = [], []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        y = place(first, value)[1]
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--rule)"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    for x, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
        parts.append(f'<text x="{place(x, low)[0]:.1f}" y="{bottom + 20}" text-anchor="{anchor}">step {x:g}</text>')
    for number, (name, points) in enumerate(drawn.items()):
        stroke, dash = _STROKES[number % len(_STROKES)], _DASHES[number % len(_DASHES)]
        style = f'fill="none" stroke="{stroke}" stroke-width="2" stroke-dasharray="{dash}"'
        placed = [place(x, y) for x, y in points]
        parts.append(f'<polyline {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
        if len(placed) <= 30:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{stroke}"/>' for x, y in placed]
        at = left + number * 140
        parts.append(
            f'<line x1="{at}" x2="{at + 28}" y1="14" y2="14" {style}/><text x="{at + 34}" y="18">{escape(name)}</text>'
        )
        said.append(
            f"{name}: {points[0][1]:.4g} at step {points[0][0]:g}, {points[-1][1]:.4g} at step {points[-1][0]:g}"
        )
    return (
        f'<svg viewBox="0 0 720 280" role="img" aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-desc">{escape("; ".join(said))}.</desc>{"".join(parts)}</svg>'
    )


def _points(lines: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    found = [(line.get("step"), line.get(key)) for line in lines]
    return [(float(x), float(y)) for x, y in found if x is not None and y is not None and math.isfinite(y)]


def _scalars(line: Mapping[str, Any]) -> list[str]:
    """The metrics of an evaluation that are one number."""
    return [k for k, v in line.items() if k.startswith("eval_") and k != "eval_loss" and isinstance(v, int | float)]


def _pairs(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td>{_cell(v)}</td></tr>' for k, v in rows.items() if v is not None
    )
    return f"<table>{cells}</table>" if cells else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(v)}</td>' for v in row)}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<table class="numbers">{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return escape(f"{value:.6g}" if isinstance(value, float) else str(value))


def _label(labels: Sequence[str], number: int) -> str:
    return str(labels[number]) if number < len(labels) else str(number)


def _time(seconds: Any) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing or damaged: the page shows the rest."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def main(argv: list[str] | None = None) -> int:
    """`python -m afina.report RUN_DIR`."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m afina.report RUN_DIR", file=sys.stderr)
        return InputError.exit_code
    try:
        print(write_report(arguments[0]))
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
