"""What a run will take, before it is queued: time, memory, attempts, room. Pure: numbers in, a forecast out.

Memory of a process that trains P numbers in float32 with AdamW: weights 4 P, gradients 4 P, two moments 8 P; once more 12 P on
the first process for the copy that a save writes; activations of the longest batch; and what Python and its libraries take.
Activations per layer are those of "Reducing Activation Recomputation in Large Transformer Models" (Korthikanti et al. 2022,
section 4), in float32 where training is. Time comes from a rehearsal or from earlier runs; where there is neither, it is not guessed.

Not covered: other optimizers than AdamW, activation checkpointing, the exchange of gradients between processes, and what a
machine does beside the run. On GPUs the memory was not measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from afina.recipe.time_limit import minutes_in_words
from afina.run.plan import Plan
from afina.schedule import Schedule

__all__ = ["Earlier", "Estimate", "Measured", "Shape", "describe", "forecast", "memory_of", "pace"]

GB = 1e9
#: Python, torch, transformers and their libraries before a model is loaded: 0.37 GB, measured on a CPU.
_BASE_BYTES = 0.45e9
#: CUDA context, cuBLAS and NCCL buffers. From documentation, not measured.
_CUDA_BYTES = 1.0e9
#: What the forecast is multiplied by before it is asked for: machines differ, and a job that is killed has lost more.
_MORE_TIME, _MORE_MEMORY = 1.25, 1.2
_STOP_LEAD_S = 15.0


class Measured(BaseModel):
    """What a rehearsal measured, as `afina.worker.training.rehearsal` says it. Bytes, seconds, costs in tokens."""

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
class Shape:
    """What decides about memory where nothing was measured.

    Attributes:
        longest: tokens of the longest texts, as many as one process takes at once: no batch has more.
        half: activations in 16 bits (`bf16` or `fp16` in `train.arguments`).
        attention_dropout: attention probabilities are kept for the backward pass.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    longest: tuple[int, ...]
    train_rows: int
    eval_rows: int = 0
    test_rows: int = 0
    half: bool = False
    attention_dropout: bool = True


@dataclass(frozen=True)
class Earlier:
    """A finished run of the same shape. Seconds of wall time; `other_seconds` are evaluations, saves and the end."""

    name: str
    device: str
    examples_per_second: float
    startup_seconds: float
    other_seconds: float
    evaluated_rows: int
    peak_gb: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A forecast. None where there is nothing to tell it from.

    Attributes:
        basis: rehearsal, earlier runs, or model (memory from its numbers, no time).
        seconds: wall time of all attempts, start-up included.
        seconds_by_part: startup, steps, evaluations, saves.
        host_gb: memory of the busiest node; gpu_gb: of each GPU.
        checkpoint_gb, disk_gb: one checkpoint, and all that stands beside each other in the run directory at most.
        asked_time_min, asked_mem_gb: what the recipe asks for.
        time_min, mem_gb: what to ask for.
        attempts: how often the job goes through the queue under the limit that it asks for.
        limit_min: the longest time that the partition allows.
        notes: what the forecast does not know.
    """

    basis: str
    device: str
    total_steps: int
    seconds: float | None
    seconds_by_part: dict[str, float]
    host_gb: float
    gpu_gb: float | None
    checkpoint_gb: float
    disk_gb: float
    asked_time_min: int
    asked_mem_gb: int | None
    time_min: int | None
    mem_gb: int
    attempts: int | None
    limit_min: int | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def memory_of(shape: Shape, *, first: bool = True) -> dict[str, float]:
    """Bytes of one process by part.

    Args:
        first: the process that saves.
    """
    p, width = float(shape.parameters), 2.0 if shape.half else 4.0
    tokens = float(sum(shape.longest))
    # Elements that the backward pass needs, per token: 8 H + 2 I, and two masks of one byte each H.
    linear = tokens * (width * (8 * shape.hidden + 2 * shape.intermediate) + 2 * shape.hidden)
    squares = sum(float(n) * n for n in shape.longest) * shape.heads
    attention = squares * (2 * width + 1) if shape.attention_dropout else 0.0
    return {
        "base": _BASE_BYTES,
        "weights": 4 * p,
        "gradients": 4 * p,
        "moments": 8 * p,
        "copy": 12 * p if first else 0.0,
        "activations": shape.layers * (linear + attention),
    }


def pace(costs: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, b) of seconds = a + b × cost, neither negative: the line of Theil and Sen, which a step that was held up does not move.

    Proportional where no two costs differ.
    """
    pairs = list(zip(costs, seconds, strict=True))
    ratio = median(y / x for x, y in pairs)
    slopes = [(y - v) / (x - u) for (x, y), (u, v) in itertools.combinations(pairs, 2) if abs(x - u) > 1e-6 * x]
    if not slopes:
        return 0.0, ratio
    # Noise may tilt the line: a slope that is negative, or steeper than through the origin, is no truth about steps.
    slope = min(max(median(slopes), 0.0), ratio)
    return max(0.0, median(y - slope * x for x, y in pairs)), slope


def forecast(
    plan: Plan,
    shape: Shape,
    *,
    measured: Measured | None = None,
    earlier: Sequence[Earlier] = (),
    limit_min: int | None = None,
) -> Estimate:
    """The forecast, from a rehearsal if there is one for this device, else from earlier runs, else from the model alone.

    Args:
        limit_min: the longest time that the partition allows.
    """
    geometry, train = plan.geometry, plan.recipe.train
    schedule = train.schedule(shape.train_rows, shape.eval_rows)
    evaluations = _evaluations(plan, schedule)
    notes: list[str] = []
    wanted = "cuda" if geometry.gpus_per_node else "cpu"
    by_part: dict[str, float] = {}
    basis = "model"
    if measured is not None and measured.device != wanted:
        notes.append(
            f"rehearsed on the {measured.device} and the job asks for GPUs: no time is told; rehearse inside an allocation: "
            "srun --gpus=1 --pty afina rehearse RECIPE"
        )
    alike = [run for run in earlier if run.device == wanted]
    if measured is not None and measured.device == wanted:
        basis, by_part = "rehearsal", _time_measured(measured, schedule, evaluations, plan)
    elif alike:
        basis, by_part = "earlier runs", _time_earlier(alike, shape, schedule, evaluations)
    elif measured is None:
        notes.append("no time is told: there is no earlier run of this shape; `afina rehearse RECIPE` measures one")
    if geometry.num_processes > 1 and basis == "rehearsal":
        notes.append("the exchange of gradients between processes is not in it")
    memory = memory_of(shape)
    host, gpu = _memory(plan, memory, measured, alike, wanted)
    one = measured.checkpoint_bytes if measured is not None and measured.checkpoint_bytes else 12.0 * shape.parameters
    disk = one * (train.keep_checkpoints + 2) + one / 3
    seconds = round(sum(by_part.values()), 1) if by_part else None
    time_min, attempts = _asking(plan, seconds, by_part, limit_min)
    return Estimate(
        basis=basis,
        device=wanted,
        total_steps=schedule.total_steps,
        seconds=seconds,
        seconds_by_part={name: round(value, 2) for name, value in by_part.items()},
        host_gb=round(host / GB, 2),
        gpu_gb=None if gpu is None else round(gpu / GB, 2),
        checkpoint_gb=round(one / GB, 3),
        disk_gb=round(disk / GB, 3),
        asked_time_min=plan.recipe.resources.time,
        asked_mem_gb=plan.recipe.resources.mem_gb,
        time_min=time_min,
        mem_gb=max(1, math.ceil(host / GB * _MORE_MEMORY)),
        attempts=attempts,
        limit_min=limit_min,
        notes=tuple(notes),
    )


def _evaluations(plan: Plan, schedule: Schedule) -> int:
    """How often the eval set is gone through: as scheduled, and once more for the best step's predictions."""
    return schedule.evaluations + (1 if plan.recipe.train.keep == "best" and schedule.evaluations > 1 else 0)


def _time_measured(measured: Measured, schedule: Schedule, evaluations: int, plan: Plan) -> dict[str, float]:
    fixed, slope = pace(measured.costs, measured.seconds)
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
    }


def _time_earlier(runs: Sequence[Earlier], shape: Shape, schedule: Schedule, evaluations: int) -> dict[str, float]:
    """The newest three, by their mean."""
    runs = runs[:3]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    per_row = mean([run.other_seconds / max(1, run.evaluated_rows) for run in runs])
    return {
        "startup": mean([run.startup_seconds for run in runs]),
        "steps": schedule.examples_after(schedule.total_steps) / mean([run.examples_per_second for run in runs]),
        "evaluations": per_row * (evaluations * shape.eval_rows + shape.test_rows),
        "saves": 0.0,  # in what the earlier runs took beside their steps
    }


def _memory(
    plan: Plan, memory: dict[str, float], measured: Measured | None, alike: Sequence[Earlier], wanted: str
) -> tuple[float, float | None]:
    """Bytes of the busiest node, and of each GPU."""
    processes = plan.geometry.processes_per_node
    copy = memory["copy"]
    state = memory["weights"] + memory["gradients"] + memory["moments"]
    if wanted == "cpu":
        one = memory["base"] + state + copy + memory["activations"]
        peaks = [run.peak_gb * GB for run in alike if run.peak_gb]
        if measured is not None and measured.device == "cpu":
            one = float(measured.peak_bytes)
        elif peaks:
            one = max(peaks)
        return one + (processes - 1) * max(one - copy, memory["base"]), None
    # On the host: the weights while they are loaded, and the copy that is saved.
    host = memory["base"] + _CUDA_BYTES + max(memory["weights"], copy)
    gpu = _CUDA_BYTES + state + memory["activations"]
    if measured is not None and measured.device == "cuda":
        host = float(measured.peak_bytes)
        gpu = float(measured.gpu_peak_bytes or 0) + _CUDA_BYTES
    return host + (processes - 1) * (memory["base"] + _CUDA_BYTES + memory["weights"]), gpu


def _asking(
    plan: Plan, seconds: float | None, by_part: dict[str, float], limit_min: int | None
) -> tuple[int | None, int | None]:
    """Minutes to ask for, and the attempts that the limit asked for implies."""
    if seconds is None:
        return None, None
    wanted = _round_up(seconds * _MORE_TIME / 60 + 5)
    asked = plan.recipe.resources.time if limit_min is None else min(plan.recipe.resources.time, limit_min)
    startup = by_part.get("startup", 0.0)
    # What an attempt has for training: it starts up, and it stops two saves before the limit.
    usable = asked * 60 - startup - _STOP_LEAD_S - 2 * by_part.get("saves", 0.0)
    attempts = max(1, math.ceil((seconds - startup) / usable)) if usable > 0 else None
    return (wanted if limit_min is None else min(wanted, limit_min)), attempts


def _round_up(minutes: float) -> int:
    """To 5 minutes up to an hour, to 15 up to four, to an hour beyond."""
    unit = 5 if minutes <= 60 else 15 if minutes <= 240 else 60
    return math.ceil(minutes / unit) * unit


def describe(said: Mapping[str, Any]) -> list[str]:
    """A forecast, as `Estimate.to_json` gives it, in a few lines for people."""
    e = Estimate(**{field.name: said[field.name] for field in fields(Estimate)})
    took = "no time is told" if e.seconds is None else f"about {_words_of_seconds(e.seconds)}"
    gpu = f", {e.gpu_gb:.1f} GB of each GPU" if e.gpu_gb is not None else ""
    memory = f"resources.mem_gb {e.asked_mem_gb}" if e.asked_mem_gb else "the cluster's usual memory"
    enough = f"--time {e.time_min}, " if e.time_min is not None else ""
    lines = [
        f"forecast from {_BASES[e.basis]}: {e.total_steps:,} steps, {took}; memory {e.host_gb:.1f} GB per node{gpu}; "
        f"a checkpoint {e.checkpoint_gb:.2f} GB, the run directory up to {e.disk_gb:.1f} GB",
        f"asked for: {minutes_in_words(e.asked_time_min)}, {memory}; enough: {enough}resources.mem_gb {e.mem_gb}",
    ]
    if e.attempts is None and e.seconds is not None:
        lines.append("warning: the time asked for is over before much is done")
    elif e.attempts is not None and e.attempts > 1:
        lines.append(f"in that time it is not done: the job goes through the queue {e.attempts} times")
    if e.asked_mem_gb is not None and e.asked_mem_gb < e.host_gb:
        lines.append(f"warning: {e.asked_mem_gb} GB are asked for, and {e.host_gb:.1f} GB are foreseen")
    return [*lines, *(f"note: {note}" for note in e.notes)]


_BASES = {"rehearsal": "a rehearsal", "earlier runs": "earlier runs like it", "model": "the model's numbers"}


def _words_of_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else minutes_in_words(seconds / 60)
