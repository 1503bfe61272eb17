"""Forecast of a run before it is queued: time, memory, attempts, disk. Pure: numbers in, a forecast out.

Time and memory come from a rehearsal or from earlier runs; without such evidence they are unknown, and the forecast says how to
rehearse. Exact without evidence, in any precision of `train.precision`: steps, and the sizes that the model itself tells (`afina.sizes`).

Not covered: communication between processes, and what else the machine does meanwhile. Memory on GPUs was not measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from afina.run.plan import Plan
from afina.schedule import Schedule, embedding_seconds, stop_lead_s
from afina.sizes import Sizes
from afina.text import minutes_in_words, seconds_in_words, size_in_words

__all__ = ["Earlier", "Estimate", "Measured", "Workload", "describe", "estimate", "fit_line"]

GB = 1e9
#: Slurm's G, in which `resources.mem_gb` is counted.
GIB = 2**30
#: Python, torch, transformers and their libraries before a model is loaded: 0.37 GB, measured on a CPU.
_BASE_BYTES = 0.45e9
#: The process that starts several of them on a node: 0.23 GB.
_LAUNCHER_BYTES = 0.25e9
#: The process that trains simple models on frozen embeddings, without the weights of the model: 0.47 to 0.74 GB.
_SIMPLE_BYTES = 0.75e9
#: CUDA context, cuBLAS and NCCL buffers, which PyTorch's own count leaves out. From documentation, not measured.
_CUDA_BYTES = 1.0e9
#: Margins of a request: machines differ, and a job that is killed costs more than one that asks for too much.
_MORE_TIME, _MORE_MEMORY = 1.25, 1.2
#: Two processes that start, TF-IDF of a few thousand rows, and the comparisons: measured on two cores.
_AROUND_EMBEDDING_S = 8.0
_EARLY = "early stopping may end the run sooner: steps and time are the most that it takes"
_REHEARSE = "`afina rehearse RECIPE` measures them here, `afina submit --rehearse` before it submits"


class Measured(BaseModel):
    """Measurements of a rehearsal, see `afina.worker.node.rehearsal`. Bytes, seconds, costs in tokens."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    device: str
    device_name: str
    threads: int
    batching: str
    parameters: int
    costs: tuple[float, ...]
    seconds: tuple[float, ...]
    mean_cost: float
    longest_tokens: int
    train_rows: int
    eval_cost: float = 0.0
    test_cost: float = 0.0
    eval_seconds_per_cost: float | None = None
    save_seconds: float | None = None
    stall_seconds: float | None = None
    checkpoint_bytes: int | None = None
    startup_seconds: float
    base_bytes: int
    peak_bytes: int
    gpu_peak_bytes: int | None = None
    gpu_total_bytes: int | None = None
    network: str = "offline variables"


@dataclass(frozen=True)
class Workload:
    """The work of a run, as the prepare stage knows it.

    Attributes:
        rows, tokens: by split.
        simple_models: they are trained beside it.
        sizes: None where the model's files do not tell them.
    """

    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    simple_models: bool = False
    sizes: Sizes | None = None


@dataclass(frozen=True)
class Earlier:
    """A finished run of the same model, lengths and geometry.

    Attributes:
        other_seconds: evaluations, saves and the end.
        evaluated_tokens: of all evaluations and of test.
        simple_seconds: of the simple models beside it; None: it had none.
        save_seconds: of the longest save.
        peak_gb: largest memory of a process, on a GPU that of the GPU.
    """

    name: str
    device: str
    tokens_per_second: float
    startup_seconds: float
    other_seconds: float
    evaluated_tokens: int
    peak_gb: float | None = None
    simple_seconds: float | None = None
    save_seconds: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """A forecast. None: unknown.

    Attributes:
        basis: rehearsal, earlier runs, or model (no evidence: steps and sizes of the model's state alone).
        seconds: wall time of all attempts, start-up included.
        seconds_by_part: startup, steps, evaluations, saves, simple_models.
        host_gb: memory of the busiest node; gpu_gb: of each GPU.
        state_gb: weights, gradients and optimizer state of one process, a part of its memory.
        checkpoint_gb, disk_gb: one checkpoint, and the largest size of the run directory.
        asked_time_min, asked_mem_gb: the recipe's request; time_min, mem_gb: enough.
        attempts: jobs that the run needs under the requested time limit.
        limit_min: the longest time that the partition allows.
        notes: what the forecast does not know.
    """

    basis: str
    device: str
    total_steps: int
    seconds: float | None
    seconds_by_part: dict[str, float]
    host_gb: float | None
    gpu_gb: float | None
    checkpoint_gb: float | None
    disk_gb: float | None
    asked_time_min: int
    asked_mem_gb: int | None
    time_min: int | None
    mem_gb: int | None
    attempts: int | None
    limit_min: int | None = None
    notes: tuple[str, ...] = ()
    state_gb: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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


def estimate(
    plan: Plan,
    work: Workload,
    *,
    measured: Measured | None = None,
    earlier: Sequence[Earlier] = (),
    limit_min: int | None = None,
) -> Estimate:
    """The forecast from a rehearsal on the plan's kind of device, else from earlier runs.

    Args:
        limit_min: the longest time that the partition allows.
    """
    resources, train = plan.recipe.resources, plan.recipe.train
    device = "cuda" if plan.geometry.gpus_per_node else "cpu"
    rehearsed = measured if measured is not None and measured.device == device else None
    alike = [run for run in earlier if run.device == device]
    schedule = train.schedule(work.rows["train"], work.rows.get("eval", 0))
    evaluations = _evaluations(plan, schedule)
    basis, by_part = "model", {}
    if rehearsed is not None:
        basis, by_part = "rehearsal", _time_measured(rehearsed, schedule, evaluations, plan)
    elif alike:
        basis, by_part = "earlier runs", _time_earlier(alike, work, schedule, evaluations)
    host, gpu = _memory(plan, work, rehearsed, alike)
    checkpoint, disk, state = _sizes(plan, work.sizes, measured)
    if by_part and not work.simple_models:
        by_part["simple_models"] = 0.0
    seconds = round(sum(by_part.values()), 1) if by_part else None
    startup_s, lead_s = by_part.get("startup", 0.0), _stop_lead_s(rehearsed, alike)
    time_min, attempts = _requests(plan, seconds, startup_s, lead_s, limit_min)
    return Estimate(
        basis=basis,
        device=device,
        total_steps=schedule.total_steps,
        seconds=seconds,
        seconds_by_part={name: round(value, 2) for name, value in by_part.items()},
        host_gb=_gb(host),
        gpu_gb=_gb(gpu),
        checkpoint_gb=_gb(checkpoint),
        disk_gb=_gb(disk),
        asked_time_min=resources.time,
        asked_mem_gb=resources.mem_gb,
        time_min=time_min,
        mem_gb=None if host is None else max(1, math.ceil(host / GIB * _MORE_MEMORY)),
        attempts=attempts,
        limit_min=limit_min,
        notes=(*_notes(plan, basis, measured), *([_EARLY] if train.early_stopping else [])),
        state_gb=_gb(state),
    )


def _sizes(plan: Plan, sizes: Sizes | None, measured: Measured | None) -> tuple[int | None, int | None, float | None]:
    """Bytes of a checkpoint, of the run directory, and of one process's weights, gradients and optimizer state."""
    train, checkpoint = plan.recipe.train, measured.checkpoint_bytes if measured else None
    if sizes is None:
        return checkpoint, None, None
    checkpoint = checkpoint or sizes.checkpoint
    disk = sizes.of_run(train.keep_checkpoints, best=train.keep == "best", checkpoint=checkpoint)
    return checkpoint, disk, sizes.state / _shares(plan)


def _gb(size: float | None) -> float | None:
    return None if size is None else round(size / GB, 6)


def _notes(plan: Plan, basis: str, measured: Measured | None) -> tuple[str, ...]:
    if basis == "model" and measured is not None:
        return (
            f"time and memory are unknown: the rehearsal ran on the {measured.device}, and the job requests GPUs; rehearse inside "
            "an allocation: srun --gpus=1 --pty afina rehearse RECIPE",
        )
    if basis == "model":
        return (f"time and memory are unknown: there is no earlier run like this one; {_REHEARSE}",)
    if basis == "rehearsal" and plan.geometry.num_processes > 1:
        notes = ["communication between processes is not included"]
        if _shares(plan) > 1:
            notes.append("memory of shards is computed from that of one process that held the whole model")
        return tuple(notes)
    return ()


def _evaluations(plan: Plan, schedule: Schedule) -> int:
    """Passes over the eval split: as scheduled, and once more for the predictions of the best step."""
    return schedule.evaluations + (1 if plan.recipe.train.keep == "best" and schedule.evaluations > 1 else 0)


def _time_measured(measured: Measured, schedule: Schedule, evaluations: int, plan: Plan) -> dict[str, float]:
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


def _time_earlier(runs: Sequence[Earlier], work: Workload, schedule: Schedule, evaluations: int) -> dict[str, float]:
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


def _memory(
    plan: Plan, work: Workload, rehearsed: Measured | None, alike: Sequence[Earlier]
) -> tuple[float | None, float | None]:
    """Bytes of the busiest node, and of each GPU."""
    one = gpu = None
    peaks = [run.peak_gb * GB for run in alike if run.peak_gb]
    if rehearsed is not None:
        one = float(rehearsed.peak_bytes) + _growth(rehearsed, work.sizes)
        gpu = rehearsed.gpu_peak_bytes and rehearsed.gpu_peak_bytes + _CUDA_BYTES
    elif peaks and plan.geometry.gpus_per_node:
        gpu = max(peaks) + _CUDA_BYTES
    elif peaks:
        one = max(peaks)
    if one is None:
        return None, gpu
    # It is trained when the run's processes have ended their work, and have not given their memory back.
    beside = _SIMPLE_BYTES + (work.sizes.weights if work.sizes else 0) if work.simple_models else 0
    beside += _LAUNCHER_BYTES if plan.geometry.num_processes > 1 else 0
    if rehearsed is not None and _shares(plan) > 1 and work.sizes:
        host, gpu = _sharded_memory(plan, work.sizes, one, gpu)
        return host + beside, gpu
    if rehearsed is not None and plan.recipe.train.keep == "best" and work.sizes:
        one += work.sizes.exported  # the best weights are read beside the last ones
    # The first process of a run holds a copy of its state while a checkpoint is written.
    other = max(one - (work.sizes.checkpoint if work.sizes else 0), _BASE_BYTES)
    return one + (plan.geometry.processes_per_node - 1) * other + beside, gpu


def _growth(rehearsed: Measured, sizes: Sizes | None) -> float:
    """What further steps take on a CPU, where batches of other lengths fragment the heap: as much again as the activations of the rehearsal.

    Measured on five runs, from a tiny model to BERT base: 0.7 to 1.0 times.
    """
    kept = sizes.state + sizes.checkpoint if sizes else 0
    return max(0, rehearsed.peak_bytes - rehearsed.base_bytes - kept) if rehearsed.device == "cpu" else 0


def _shares(plan: Plan) -> int:
    """Among how many processes weights, gradients and optimizer state are divided."""
    return plan.geometry.num_processes if plan.recipe.train.sharding != "none" else 1


def _sharded_memory(plan: Plan, sizes: Sizes, host: float, gpu: float | None) -> tuple[float, float | None]:
    """Of the busiest node and of each GPU, from that of a rehearsal, whose process held the whole model: computed, not measured.

    Each process reads the whole model into host memory before it keeps its share.
    """
    elsewhere = 1 - 1 / _shares(plan)
    state, copy = sizes.state * elsewhere, sizes.checkpoint * elsewhere
    one = max(host - copy - (0 if gpu else state), _BASE_BYTES + sizes.weights)
    return plan.geometry.processes_per_node * one, gpu and max(gpu - state, _CUDA_BYTES)


def _stop_lead_s(rehearsed: Measured | None, alike: Sequence[Earlier]) -> float:
    """How long before its time limit an attempt stops training."""
    if rehearsed is not None:
        return stop_lead_s(rehearsed.save_seconds or 0.0, max(rehearsed.seconds))
    return stop_lead_s(max((run.save_seconds for run in alike), default=0.0), 0.0)


def _requests(
    plan: Plan, seconds: float | None, startup_s: float, lead_s: float, limit_min: int | None
) -> tuple[int | None, int | None]:
    """Minutes to request, and the attempts that the requested limit implies.

    Args:
        lead_s: how long before its time limit an attempt stops.
    """
    if seconds is None:
        return None, None
    enough = _round_up(seconds * _MORE_TIME / 60 + 5)
    requested = plan.recipe.resources.time if limit_min is None else min(plan.recipe.resources.time, limit_min)
    # An attempt trains between its start-up and the stop.
    usable = requested * 60 - startup_s - lead_s
    attempts = max(1, math.ceil((seconds - startup_s) / usable)) if usable > 0 else None
    return (enough if limit_min is None else min(enough, limit_min)), attempts


def _round_up(minutes: float) -> int:
    """To 5 minutes up to an hour, to 15 up to four, to an hour beyond."""
    unit = 5 if minutes <= 60 else 15 if minutes <= 240 else 60
    return math.ceil(minutes / unit) * unit


def describe(values: Mapping[str, Any]) -> list[str]:
    """A forecast, as `Estimate.to_json` gives it, in a few lines; one of an earlier afina too."""
    e = Estimate(**{field.name: values[field.name] for field in fields(Estimate) if field.name in values})
    duration = "time unknown" if e.seconds is None else f"about {seconds_in_words(e.seconds)}"
    parts = [f"memory {_size(e.host_gb)} per node" if e.host_gb is not None else "memory unknown"]
    if e.gpu_gb is not None:
        parts.append(f"{_size(e.gpu_gb)} of each GPU")
    if e.state_gb is not None and e.basis == "model":
        parts.append(f"{_size(e.state_gb)} of it weights, gradients and optimizer state")
    size = "" if e.checkpoint_gb is None else f"; a checkpoint {_size(e.checkpoint_gb)}"
    size += "" if e.disk_gb is None else f", the run directory up to {_size(e.disk_gb)}"
    source = {"rehearsal": " from a rehearsal", "earlier runs": " from earlier runs like it"}.get(e.basis, "")
    lines = [f"forecast{source}: {e.total_steps:,} steps, {duration}; {', '.join(parts)}{size}"]
    memory = f"resources.mem_gb {e.asked_mem_gb}" if e.asked_mem_gb else "the cluster's default memory"
    enough = [f"--time {e.time_min}"] if e.time_min is not None else []
    enough += [f"resources.mem_gb {e.mem_gb}"] if e.mem_gb is not None else []
    requested = f"requested: {minutes_in_words(e.asked_time_min)}, {memory}"
    lines.append(requested + (f"; enough: {', '.join(enough)}" if enough else ""))
    if e.attempts is None and e.seconds is not None:
        lines.append("warning: the requested time is too short for an attempt to train")
    elif e.attempts is not None and e.attempts > 1:
        lines.append(f"that time is not enough for the run: it takes {e.attempts} jobs, each resumes the last")
    if e.asked_mem_gb is not None and e.host_gb is not None and e.asked_mem_gb * GIB < e.host_gb * GB:
        lines.append(f"warning: {e.asked_mem_gb} GB are requested, and the forecast is {_size(e.host_gb)}")
    return [*lines, *(f"note: {note}" for note in e.notes)]


def _size(gigabytes: float) -> str:
    return size_in_words(gigabytes * GB)
