"""Sections about the work: lengths and padding, speed, time, requested and used resources. Pure: facts -> HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afina.reports.charts import Chart, Point
from afina.reports.facts import Lengths, RunFacts
from afina.reports.page import note, pairs, seconds, table
from afina.run.outcome import part_in_words
from afina.run.provenance.methods import trained_count
from afina.slurm.accounting import JobUsage
from afina.text import size_in_words

__all__ = ["lengths", "requested_and_used", "speed", "time_spent"]


def lengths(facts: RunFacts) -> tuple[str, list[Chart]]:
    """Lengths of the texts and the cost of padding: a table, notes, and a chart of the training texts."""
    known = {split: value for split, value in facts.lengths.items() if isinstance(value, Lengths)}
    html = "".join(note(reason) for reason in dict.fromkeys(v for v in facts.lengths.values() if isinstance(v, str)))
    if not known:
        return html, []
    limit, windows = facts.plan.recipe.tokens.max_length, facts.plan.recipe.tokens.windows
    rows = [
        [
            split,
            v.shortest,
            f"{v.median:g}",
            f"{v.mean:.1f}",
            v.longest,
            f"{v.cut} ({v.cut / v.rows:.1%})",
            *(["–", "–"] if windows else [f"{v.mean / limit:.1%}", f"{v.longest_share:.1%}"]),
        ]
        for split, v in known.items()
    ]
    heads = ["split", "shortest", "median", "mean", "longest", f"{limit} or more", "real, padded", "real, longest"]
    html += table(heads, rows, "Tokens per text, special tokens included")
    asked = facts.plan.recipe.tokens.batching
    ran = next((e["batching"] for e in reversed(facts.events) if "batching" in e), None)
    batching = f"This run's batching was {ran}" if ran else f"The recipe's batching is {asked}"
    html += note(
        f"“real” is the share of tokens that are not padding, if texts are padded to {limit} tokens (padded) or to the longest text of a "
        f"random batch of {facts.plan.geometry.batch_per_device} (longest). {batching}; packed batches have no padding. Longer texts were cut {facts.plan.recipe.tokens.cut}."
    )
    if windows:
        html += note(
            f"A text of more than {limit} tokens is read as windows that share {windows.stride}, which are counted twice here; its logits "
            f"are the {windows.pool} of theirs."
        )
    split = "train" if "train" in known else next(iter(known))
    v = known[split]
    chart = Chart(
        "lengths",
        f"Tokens per text in {split}",
        x="tokens",
        y="share of texts",
        bars={split: [(low, high, n / v.rows) for low, high, n in v.bars]},
        description=f"{v.rows:,} texts of {v.shortest} to {v.longest} tokens, half of them up to {v.median:g}.",
    )
    return html, [chart]


def speed(facts: RunFacts) -> tuple[str, list[Chart]]:
    """Throughput, utilisation and memory, as far as the run measured them."""
    utilisation, trained = facts.utilisation, facts.plan.recipe.trained
    rows: dict[str, Any] = {
        "training examples per second": facts.outcome.samples_per_second if facts.outcome else None,
        "tokens per second": utilisation.get("tokens_per_second"),
        "share of real tokens": _percent(utilisation.get("real_token_share")),
        "model FLOP utilisation": _percent(utilisation.get("mfu")),
        "of a peak of": _peak(utilisation),
        "trained": f"{trained} ({trained_count(facts.outcome)})" if trained else None,
        "model": _sharded(facts),
        f"largest memory of a {_measured_place(facts)}": _size(utilisation.get("peak_memory_gb"), 1e9),
        "examples per step": utilisation.get("examples_per_step"),
    }
    pace = [event for event in facts.events if event.get("event") == "pace"]
    charts = [
        Chart("speed", "Tokens per second by step", lines={"tokens per second": _pace(pace, "tokens_per_s")}),
        Chart("examples", "Examples per second by step", lines={"examples per second": _pace(pace, "examples_per_s")}),
        Chart(
            "memory",
            f"Memory of the first {_measured_place(facts)} in GB by step",
            lines={"memory": _pace(pace, "memory_gb")},
        ),
    ]
    if charts[0]:
        del charts[1]
    return pairs(rows), [chart for chart in charts if chart]


def _sharded(facts: RunFacts) -> str | None:
    processes = facts.outcome.world_size if facts.outcome else None
    sharded = facts.plan.recipe.train.sharding != "none" and (processes or 1) > 1
    return f"sharded over {processes} processes (FSDP2)" if sharded else None


def time_spent(facts: RunFacts) -> str:
    """Wall time by part of the training and by attempt."""
    parts = {
        part_in_words(str(k)): v
        for k, v in (facts.utilisation.get("seconds_by_part") or {}).items()
        if isinstance(v, int | float)
    }
    total = sum(parts.values()) or 1.0
    html = table(
        ["part", "time", "share"],
        [[name, seconds(s), f"{s / total:.1%}"] for name, s in parts.items()],
        "All attempts, as far as checkpoints record it",
    )
    rows = []
    for attempt in facts.attempts:
        t = attempt.times
        if t.started is None or t.last is None:
            continue
        began = None if t.training is None else t.training - t.started
        first = None if t.first_step is None or t.training is None else t.first_step - t.training
        rows.append(
            [
                attempt.name,
                seconds(t.last - t.started),
                seconds(began),
                seconds(first),
                t.step,
                t.newest_step,
                t.saves,
                seconds(t.save_s),
                seconds(t.stall_s),
            ]
        )
    heads = [
        "attempt",
        "wall time",
        "start-up",
        "first step",
        "from step",
        "to step",
        "saves",
        "writing",
        "training paused",
    ]
    caption = "By attempt; checkpoints are written while training continues"
    return html + table(heads, rows, caption)


def requested_and_used(facts: RunFacts) -> str:
    """Resources that the recipe requests, and what the attempts and Slurm's accounting say was used."""
    resources, jobs = facts.plan.recipe.resources, list(facts.jobs or [])
    spent = [a.times.last - a.times.started for a in facts.attempts if a.times.last and a.times.started]
    rows: list[list[Any]] = []
    if spent:
        share = f"{max(spent) / (resources.time * 60):.0%}"
        rows.append(["time of the longest attempt", f"{resources.time} min", seconds(max(spent)), share])
    what, memory = "memory per node, largest task", _largest([job.memory_bytes for job in jobs])
    if memory is None and not _on_gpu(facts):  # there the run measures the memory of the GPU, which nobody requests
        what, memory = "memory per node, largest process", _memory_measured(facts)
    given = f" (resources.mem_gb {resources.mem_gb})" if resources.mem_gb else ""
    asked = (resources.mem_gb or 0) * 2**30 or _largest([job.asked_memory_bytes for job in jobs])  # Slurm's G
    if memory is not None:
        requested = f"{size_in_words(asked)}{given}" if asked else "the cluster's default"
        rows.append([what, requested, _size(memory), f"{memory / asked:.0%}" if asked else None])
    cpu = sum(job.cpu_s or 0 for job in jobs)
    held = sum(job.elapsed_s * job.cpus for job in jobs)
    if held:
        rows.append(["processor time", f"{seconds(held)} on all cores", seconds(cpu), f"{cpu / held:.0%}"])
    html = table(["resource", "requested or allocated", "used", "share"], rows, "All attempts together")
    energy = sum(job.energy_j or 0 for job in jobs)
    if energy:
        html += pairs(
            {"energy": f"{energy / 3.6e6:.3g} kWh ({energy:,.0f} J), measured by Slurm, mostly for whole nodes"}
        )
    html += table(
        ["job", "state", "wall time", "limit, min", "nodes", "cores", "GPUs", "cores used", "memory", "energy, J"],
        [_job(job) for job in jobs],
        "From sacct",
    )
    if not jobs and any(attempt.environment.get("slurm") for attempt in facts.attempts):
        html += note("No accounting from Slurm (sacct): processor time, memory and energy of the jobs are unknown.")
    if hours := _gpu_hours(facts):
        html += pairs({"GPU hours": f"{hours:.2f}"})
    return html


def _gpu_hours(facts: RunFacts) -> float:
    """Of all attempts, each by its own processes: one may resume on another number of GPUs."""
    if not facts.plan.geometry.gpus_per_node:
        return 0.0
    seconds_of_gpus = 0.0
    for attempt in facts.attempts:
        geometry = attempt.environment.get("geometry") or facts.plan.geometry.model_dump()
        if attempt.times.last and attempt.times.started:
            gpus = geometry["nodes"] * geometry["processes_per_node"]
            seconds_of_gpus += gpus * (attempt.times.last - attempt.times.started)
    return seconds_of_gpus / 3600


def _job(job: JobUsage) -> list[Any]:
    return [
        job.job,
        job.state,
        seconds(job.elapsed_s),
        job.limit_min,
        job.nodes,
        job.cpus,
        job.gpus or None,
        _percent(job.cpu_share),
        _size(job.memory_bytes),
        job.energy_j,
    ]


def _on_gpu(facts: RunFacts) -> bool:
    device = facts.outcome.device if facts.outcome else None
    started = (event.get("devices") for event in facts.events if event.get("event") == "attempt_started")
    return (device or next(started, None) or "cpu") != "cpu"


def _measured_place(facts: RunFacts) -> str:
    """The thing whose memory the worker measures."""
    return "GPU" if _on_gpu(facts) else "process"


def _memory_measured(facts: RunFacts) -> float | None:
    """The largest memory of a process, or of a GPU, that the worker measured, bytes."""
    values = [e.get("memory_gb") for e in facts.events if e.get("event") == "pace"]
    values.append(facts.utilisation.get("peak_memory_gb"))
    return _largest([float(v) * 1e9 for v in values if isinstance(v, int | float)])


def _largest(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _pace(events: list[Mapping[str, Any]], key: str) -> list[Point]:
    points = {
        float(e["step"]): float(e[key])
        for e in events
        if isinstance(e.get(key), int | float) and isinstance(e.get("step"), int)
    }
    return sorted(points.items())


def _size(value: Any, unit: float = 1.0) -> str | None:
    return size_in_words(value * unit) if isinstance(value, int | float) else None


def _percent(value: Any) -> str | None:
    return f"{value:.1%}" if isinstance(value, int | float) else None


def _peak(utilisation: Mapping[str, Any]) -> str | None:
    peak, source = utilisation.get("peak_flops"), utilisation.get("peak_source")
    return f"{peak / 1e12:.4g} TFLOP/s ({source})" if isinstance(peak, int | float) else None
