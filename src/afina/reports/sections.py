"""Sections about the run: outcome, curves, data, plan, attempts, record, commands to repeat it. Pure: facts -> HTML."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from html import escape
from typing import Any

from afina.recipe.metrics import METRICS, lower_is_better, metric_name
from afina.reports.charts import Chart, Point
from afina.reports.facts import RunFacts
from afina.reports.page import note, pairs, pre, seconds, table, tiles, warnings
from afina.run.methods import methods as paragraph
from afina.statistics.predictions import Predictions
from afina.statistics.weakness import weaknesses
from afina.text import plural

__all__ = [
    "attempts",
    "curves",
    "data",
    "epochs",
    "methods",
    "outcome",
    "plan",
    "recipe",
    "record",
    "rerun",
    "summary",
    "wall_time",
]


def summary(facts: RunFacts) -> str:
    """The most important figures."""
    end = facts.outcome
    if end is None:
        return ""
    rows: dict[str, tuple[str, str]] = {
        "outcome": (end.outcome, f"{end.cause}" if end.cause and end.outcome != "finished" else "")
    }
    first = METRICS.get(facts.task) or [name for scores in facts.scores.values() for name in scores.overall] or [""]
    chosen = facts.plan.recipe.train.best_metric or first[0]
    for split in ("eval", "test"):
        if split in facts.scores and (best := facts.scores[split].overall.get(chosen)) is not None:
            below = f"95 % interval {best.low:.4f} to {best.high:.4f}" if best.low == best.low else ""
            rows[f"{chosen} on {split}"] = (f"{best.value:.4f}" if best.value == best.value else "–", below)
        elif isinstance(value := end.metrics.get(f"{split}_{metric_name(chosen)}"), int | float):
            rows[f"{metric_name(chosen)} on {split}"] = (f"{value:.4f}", "")
    rows["steps"] = (str(end.global_step), f"of {end.max_steps}" if end.max_steps else "")
    rows["wall time"] = (seconds(wall_time(facts)) or "–", plural(end.attempts, "attempt"))
    if end.samples_per_second:
        rows["speed"] = (f"{end.samples_per_second:.4g}", "training examples per second")
    return tiles(rows) + _stands_against(facts)


def _stands_against(facts: RunFacts) -> str:
    """Warnings about the run's numbers."""
    end = facts.outcome
    if end is None:
        return ""
    measured = {*facts.scores, *(name.partition("_")[0] for name in end.metrics)}
    lines = [line for split, about in facts.spoiled.items() if split in measured for line in about]
    return warnings(list(dict.fromkeys([*(end.warnings or _weakness(facts)), *lines])))


def _weakness(facts: RunFacts) -> list[str]:
    """What a run of an older afina did not record itself."""
    rows = facts.predictions.get("eval")
    metric = facts.plan.recipe.train.best_metric or ""
    return [f"the model {reason}" for reason in weaknesses(rows, metric)] if isinstance(rows, Predictions) else []


def wall_time(facts: RunFacts) -> float | None:
    """Seconds of all attempts: from the outcome, else from the first to the last event of each."""
    if facts.outcome is not None and facts.outcome.seconds:
        return facts.outcome.seconds
    spent = [a.times.last - a.times.started for a in facts.attempts if a.times.last and a.times.started]
    return sum(spent) if spent else None


def outcome(facts: RunFacts) -> str:
    end = facts.outcome
    if end is None:
        return "<p>No outcome is recorded: the run has not ended, or was never started.</p>"
    rows: dict[str, Any] = {
        "outcome": end.outcome,
        "steps": f"{end.global_step}" + (f" of {end.max_steps}" if end.max_steps else ""),
        "weights in model/": f"step {end.model_step}" if end.model_step else None,
        "task": end.task,
        "training examples per second": end.samples_per_second,
        "seconds, all attempts": end.seconds,
        "attempts": end.attempts,
        "processes": end.world_size,
        "device": end.device,
        **{k: v for k, v in end.metrics.items() if isinstance(v, int | float)},
    }
    error = f"<h3>What failed</h3>{pre(end.error, 'What failed')}" if end.error else ""
    return pairs(rows) + _stands_against(facts) + error


def epochs(facts: RunFacts) -> str:
    """The table that the run prints at its end: one row per evaluation, with the last training loss before it."""
    names = list(dict.fromkeys(k for line in facts.evaluations for k in _scalars(line)))
    rows, loss = [], None
    for line in facts.metrics:
        loss = line.get("loss", loss)
        if "eval_loss" in line:
            rows.append([line.get("epoch"), line.get("step"), loss, line["eval_loss"], *(line.get(n) for n in names)])
    heads = ["epoch", "step", "training loss", "validation loss", *(n.removeprefix("eval_") for n in names)]
    return table(heads, rows, "One row per evaluation") + warnings(facts.spoiled.get("eval", []) if rows else [])


def curves(facts: RunFacts) -> dict[str, list[Chart]]:
    """Charts over steps by section, with a mark where each attempt after the first began."""
    marks = {
        float(attempt.times.step): f"attempt {number}"
        for number, attempt in enumerate(facts.attempts, start=1)
        if number > 1 and attempt.times.step is not None
    }
    lines, evaluations = facts.metrics, facts.evaluations
    names = list(dict.fromkeys(k for line in evaluations for k in _scalars(line)))
    errors = [n for n in names if lower_is_better(n, facts.plan.recipe.metric_texts)]

    def series(chosen: Iterable[str]) -> dict[str, list[Point]]:
        return {n.removeprefix("eval_"): _points(evaluations, n) for n in chosen}

    losses = {"training": _points(lines, "loss"), "validation": _points(evaluations, "eval_loss")}
    return {
        "Loss": [Chart("loss", "Loss by step", lines=losses, marks=marks)],
        "Metrics": [
            Chart("metrics", "Metrics by step", lines=series(n for n in names if n not in errors), marks=marks),
            Chart("errors", "Errors by step", lines=series(errors), marks=marks),
        ],
        "Learning rate": [
            Chart(
                "learning-rate",
                "Learning rate by step",
                lines={"learning rate": _points(lines, "learning_rate")},
                marks=marks,
            ),
            Chart(
                "gradient-norm",
                "Norm of the gradient by step",
                lines={"norm": _points(lines, "grad_norm")},
                marks=marks,
            ),
        ],
    }


def data(facts: RunFacts) -> str:
    prepared = facts.prepared
    if not prepared:
        return ""
    tokens = prepared.get("tokens") or {}
    rows = [[split, count, tokens.get(split)] for split, count in (prepared.get("rows") or {}).items()]
    lines = [str(w) for w in prepared.get("warnings") or []]
    return (
        table(["split", "rows", "tokens"], rows, "")
        + pairs(
            {
                "labels": ", ".join(map(str, prepared.get("labels") or [])) or None,
                "data commit": prepared.get("data_commit"),
                "model commit": prepared.get("model_commit"),
                "prepared": prepared.get("prepared"),
            }
        )
        + ("<h3>Warnings</h3><ul>" + "".join(f"<li>{escape(w)}</li>" for w in lines) + "</ul>" if lines else "")
    )


def plan(facts: RunFacts) -> str:
    geometry, resources = facts.plan.geometry, facts.plan.recipe.resources
    return pairs(
        {
            "digest": facts.plan.digest,
            "nodes": geometry.nodes,
            "processes per node": geometry.processes_per_node,
            "GPUs per node": geometry.gpus_per_node,
            "CPUs per process": geometry.cpus_per_process,
            "global batch": f"{geometry.global_batch} = {geometry.batch_per_device} per device × {geometry.accumulation} accumulated × "
            f"{geometry.num_processes} processes",
            "time limit, minutes": resources.time,
            "image": facts.plan.site.image,
            "runtime": facts.plan.site.runtime,
        }
    )


def attempts(facts: RunFacts) -> str:
    rows = []
    for attempt in facts.attempts:
        geometry = attempt.environment.get("geometry") or {}
        processes = geometry.get("nodes", 0) * geometry.get("processes_per_node", 0) or None
        started, host, python = (attempt.environment.get(name) for name in ("started", "host", "python"))
        rows.append([attempt.name, _time(started), host, processes, python, attempt.exit_code])
    return table(["attempt", "started", "first host", "processes", "Python", "exit code"], rows, "")


def record(facts: RunFacts) -> str:
    """Versions, revisions and hardware: how this run was made."""
    kept, known = facts.record, [a.environment for a in reversed(facts.attempts) if a.environment]
    newest = next((one for one in known if one.get("versions")), known[0] if known else {})
    image, git = (kept.get(name) or {} for name in ("image", "git"))
    model, source = kept.get("model") or {}, kept.get("data") or {}
    hardware = newest.get("hardware") or {}
    changes = f"{len(git['changed'])} changed, {git.get('untracked', 0)} untracked files" if "changed" in git else None
    versions = newest.get("versions") or {}
    rows: dict[str, Any] = {
        "afina": kept.get("afina") or facts.plan.afina_version,
        "Python": newest.get("python"),
        **{name: versions[name] for name in sorted(versions)},
        "image": image.get("path"),
        "image SHA-256": image.get("sha256") or image.get("none"),
        "git commit": git.get("commit") or git.get("none"),
        "since that commit": changes,
        "recipe": git.get("recipe"),
        "model": model.get("name"),
        "model revision": model.get("commit")
        or ("local files, by digest in record.json" if model.get("files") else None),
        "data revision": source.get("commit"),
        "prepared data": source.get("prepared"),
        "precision": facts.execution.get("precision"),
        "processor": hardware.get("cpu"),
        "cores": newest.get("cores"),
        "memory, GB": hardware.get("memory_gb"),
        "GPUs": ", ".join(hardware.get("gpus") or []) or None,
        "GPU driver": hardware.get("driver"),
        "kernel": newest.get("kernel"),
        "Slurm": kept.get("slurm"),
    }
    if not kept:
        return note("This run has no record.json: an older afina claimed it.") + pairs(rows)
    diff = git.get("diff") or ""
    cut = " (truncated)" if git.get("diff_cut") else ""
    return pairs(rows) + (
        f"<h3>Changes since the commit{cut}</h3>{pre(diff, 'Changes since the commit')}" if diff else ""
    )


def methods(facts: RunFacts) -> str:
    text = paragraph(facts.plan, facts.outcome, facts.prepared, facts.record, facts.execution)
    return f"<p>{escape(text)}</p>"


def recipe(facts: RunFacts) -> str:
    """The recipe that was run, whatever `recipe.yaml` holds now."""
    more = f"<h3>Overrides</h3>{pre(chr(10).join(facts.overrides), 'Overrides')}" if facts.overrides else ""
    return (note(facts.recipe_note) if facts.recipe_note else "") + pre(facts.recipe_text, "Recipe") + more


def rerun(facts: RunFacts) -> str:
    """Commands that repeat this run."""
    made = facts.record.get("recipe") or {}
    pins = [
        f'{key}="{commit}"'
        for key, commit in (
            ("revision", facts.prepared.get("model_commit")),
            ("data.revision", facts.prepared.get("data_commit")),
        )
        if commit
    ]
    lines = [
        "# from the run directory, with its recipe, overrides and revisions",
        f"afina rerun {shlex.quote(str(facts.path))}",
    ]
    if made.get("overrides") is not None:
        words = [word for override in (*made["overrides"], *pins) for word in ("--set", override)]
        lines += [
            "",
            "# from the recipe above, in any folder",
            shlex.join(["afina", "train", "recipe.yaml", *words]),
        ]
    return pre("\n".join(lines), "Commands that repeat this run")


def _points(lines: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    points = ((line.get("step"), line.get(key)) for line in lines)
    return [
        (float(x), float(y))
        for x, y in points
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y)
    ]


def _scalars(line: Mapping[str, Any]) -> list[str]:
    """Names of the metrics of an evaluation that are one number."""
    return [k for k, v in line.items() if k.startswith("eval_") and k != "eval_loss" and isinstance(v, int | float)]


def _time(at: Any) -> str | None:
    if not isinstance(at, int | float):
        return None
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
