"""Sections about the run: how it stands, curves, data, plan, attempts, record, commands to repeat it. Pure: facts -> HTML."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from typing import Any

from afina.recipe.metrics import lower_is_better
from afina.reports.charts import Chart, Point, points_of, smoothed
from afina.reports.facts import RunFacts
from afina.reports.page import note, pairs, pre, seconds, table, tiles, warnings
from afina.run.directory import evaluations_of
from afina.run.provenance.methods import methods as paragraph
from afina.statistics.predictions import Predictions
from afina.statistics.weakness import weaknesses
from afina.text import number, plural, seconds_in_words

__all__ = [
    "attempts",
    "curves",
    "data",
    "epochs",
    "happened",
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
    """The most important figures, the score first, and how a run stands that has not finished."""
    end, now = facts.outcome, facts.summary
    rows: dict[str, tuple[str, str]] = {}
    for split in ("eval", "test"):
        if split in facts.scores and (best := facts.scores[split].overall.get(facts.metric)) is not None:
            below = f"95 % interval {number(best.low)} to {number(best.high)}" if best.low == best.low else ""
            always = facts.scores[split].always.get(facts.metric)
            known = f"{number(always)} by the simplest model" if always is not None else ""
            rows[f"{facts.metric} on {split}"] = (number(best.value), "; ".join(filter(None, [below, known])))
        elif end and isinstance(value := end.metrics.get(f"{split}_{facts.metric}"), int | float):
            rows[f"{facts.metric} on {split}"] = (number(value), "")
    if not rows and now.best_value is not None:
        rows[f"best {now.best_metric} on eval"] = (number(now.best_value), f"at step {now.best_step:,}")
    rows["state"] = (now.state.lower(), (end.cause or "") if end and end.outcome != "finished" else "")
    if now.step or end:
        early = ", stopped early" if end and end.early_stop else ""
        rows["steps"] = (f"{now.step:,}", f"of {now.max_steps:,}{early}" if now.max_steps else "")
    if now.seconds_left is not None:
        rows["time left"] = (seconds_in_words(now.seconds_left), "estimated from its speed")
    if (spent := wall_time(facts)) is not None:
        attempts = end.attempts if end else len(facts.attempts)
        rows["wall time"] = (seconds(spent) or "–", plural(attempts, "attempt"))
    if end and end.samples_per_second:
        rows["speed"] = (f"{end.samples_per_second:.4g}", "training examples per second")
    return tiles(rows) + _stands_against(facts)


def happened(facts: RunFacts) -> str:
    """Of a run that has not finished: how it stands, why, and what to type next."""
    now, end = facts.summary, facts.outcome
    if now.state == "FINISHED":
        return ""
    at = f" at step {now.step:,}{f' of {now.max_steps:,}' if now.max_steps else ''}" if now.step else ""
    why = f": {now.why}" if now.why else ""
    html = f'<p class="end"><strong>{now.state.capitalize()}</strong>{at}{escape(why)}</p>'
    if end is None:
        html += note("No outcome is recorded: the run has not ended, or was never started.")
    if end and end.failure and now.state != "RUNNING" and end.failure.message != now.why:
        html += pre(end.failure.message, "What failed")
    run = shlex.quote(str(facts.path))
    if now.remedy:
        html += "<h3>What to do next</h3>"
        is_command = now.remedy in (f"afina submit {run}", f"afina resume {run}")  # it is below
        html += "" if is_command else f"<p>{escape(now.remedy)}</p>"
    commands = [f"afina status {run}", f"afina logs {run}"] if facts.attempts or now.job_id else []
    if now.state in ("STOPPED", "FAILED", "PLANNED"):
        again = "submit" if now.job_id or now.state == "PLANNED" else "resume"
        commands.append(
            f"afina {again} {run}" + ("    # continues from the newest checkpoint" if facts.attempts else "")
        )
    return html + (pre("\n".join(commands), "Commands") if commands else "")


def _stands_against(facts: RunFacts) -> str:
    """Warnings about the run's numbers."""
    end = facts.outcome
    if end is None:
        return ""
    measured = {*facts.scores, *(name.partition("_")[0] for name in end.metrics)}
    lines = [line for split, about in facts.spoiled.items() if split in measured for line in about]
    return warnings(list(dict.fromkeys([*(end.warnings or _weakness(facts)), *lines])))


def _weakness(facts: RunFacts) -> list[str]:
    """Values that a run of an older afina did not record itself."""
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
    """Every number that the run itself recorded at its end."""
    end = facts.outcome
    if end is None:
        return ""
    rows: dict[str, Any] = {
        "outcome": end.outcome,
        "steps": f"{end.global_step}" + (f" of {end.max_steps}" if end.max_steps else ""),
        "stopped early": end.early_stop,
        "weights in model/": f"step {end.model_step}" if end.model_step else None,
        "task": end.task,
        "training examples per second": end.samples_per_second,
        "seconds, all attempts": end.seconds,
        "processes": end.world_size,
        "device": end.device,
        **{k: v for k, v in end.metrics.items() if isinstance(v, int | float)},
    }
    return pairs(rows)


def epochs(facts: RunFacts) -> str:
    """The table that the run prints at its end: one row per evaluation, with the mean training loss since the one before."""
    names = list(dict.fromkeys(k for line in facts.evaluations for k in _scalars(line)))
    rows = []
    for line, training_loss in evaluations_of(facts.metrics):
        values = (training_loss, line["eval_loss"], *(line.get(name) for name in names))
        rows.append([line.get("epoch"), line.get("step"), *map(number, values)])
    heads = ["epoch", "step", "training loss", "validation loss", *(n.removeprefix("eval_") for n in names)]
    return table(heads, rows, "One row per evaluation") + warnings(facts.spoiled.get("eval", []) if rows else [])


def curves(facts: RunFacts) -> list[Chart]:
    """Charts over steps, with a mark where each attempt after the first began, and the best evaluation."""
    marks = {
        float(attempt.times.step): f"attempt {count}"
        for count, attempt in enumerate(facts.attempts, start=1)
        if count > 1 and attempt.times.step is not None
    }
    lines, evaluations = facts.metrics, facts.evaluations
    names = list(dict.fromkeys(k for line in evaluations for k in _scalars(line)))
    errors = [n for n in names if lower_is_better(n, facts.plan.recipe.metric_texts)]

    def chart(key: str, title: str, chosen: Iterable[str]) -> Chart:
        series = {n.removeprefix("eval_"): points_of(evaluations, n) for n in chosen}
        return Chart(key, title, lines=series, marks=marks, best=_best(series.get(facts.metric, []), facts))

    losses = {"training": points_of(lines, "loss"), "validation": points_of(evaluations, "eval_loss")}
    rate, norm = points_of(lines, "learning_rate"), points_of(lines, "grad_norm")
    return [
        smoothed(Chart("loss", "Loss by step", lines=losses, marks=marks), "training"),
        chart("metrics", "Metrics by step", [n for n in names if n not in errors]),
        chart("errors", "Errors by step", errors),
        Chart("learning-rate", "Learning rate by step", lines={"learning rate": rate}, marks=marks),
        smoothed(Chart("gradient-norm", "Norm of the gradient by step", lines={"norm": norm}, marks=marks), "norm"),
    ]


def _best(points: Sequence[Point], facts: RunFacts) -> tuple[float, float, str] | None:
    """The best evaluation, the first of equals, as the training decides."""
    if len(points) < 2:
        return None
    pick = min if lower_is_better(facts.metric, facts.plan.recipe.metric_texts) else max
    step, value = pick(points, key=lambda point: point[1])
    return step, value, f"best: {number(value)} at step {step:.0f}"


def data(facts: RunFacts) -> str:
    prepared = facts.prepared
    if not prepared:
        return ""
    tokens = prepared.get("tokens") or {}
    groups = prepared.get("groups") or {}
    own = [f"groups ({facts.plan.recipe.data.group})"] if groups else []
    rows = [
        [split, count, tokens.get(split), *(groups.get(split) for _ in own)]
        for split, count in (prepared.get("rows") or {}).items()
    ]
    lines = [str(w) for w in prepared.get("warnings") or []]
    return (
        table(["split", "rows", "tokens", *own], rows, "")
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
        "image address": f"{image['address']} ({image.get('digest')})" if image.get("address") else None,
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
    """A paragraph to quote, of a run that has a model."""
    if facts.outcome is None or facts.outcome.outcome != "finished":
        return ""
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


def _scalars(line: Mapping[str, Any]) -> list[str]:
    """Names of the metrics of an evaluation that are one number."""
    return [k for k, v in line.items() if k.startswith("eval_") and k != "eval_loss" and isinstance(v, int | float)]


def _time(at: Any) -> str | None:
    if not isinstance(at, int | float):
        return None
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
