"""Forecast of a run before it is queued: time, memory, attempts, disk. Pure: numbers in, a forecast out.

Time and memory come from a rehearsal or from earlier runs; without such evidence they are unknown, and the forecast says how to
rehearse. Exact without evidence, in any precision of `train.precision`: steps, and the sizes that the model itself tells (`afina.sizes`).

Not covered: communication between processes, and what else the machine does meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from afina.forecast.duration import earlier_seconds, evaluation_passes, expected_stop_lead_s, rehearsed_seconds
from afina.forecast.measurements import Earlier, Measured, Workload
from afina.forecast.memory import GB, memory_bytes, shares
from afina.run.plan import Plan
from afina.sizes import Sizes
from afina.text import minutes_in_words, plural, seconds_in_words, size_in_words

__all__ = ["Estimate", "describe", "estimate"]

#: Slurm's G, in which `resources.mem_gb` is counted.
GIB = 2**30
#: Margins of a request: machines differ, and a job that is killed costs more than one that asks for too much.
_MORE_TIME, _MORE_MEMORY = 1.25, 1.2
_EARLY = "early stopping may end the run sooner: steps and time are the most that it takes"
_REHEARSE = "`afina rehearse RECIPE` measures them here, `afina submit --rehearse` before it submits"


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
    evaluations = evaluation_passes(plan, schedule)
    basis, by_part = "model", {}
    if rehearsed is not None:
        basis, by_part = "rehearsal", rehearsed_seconds(rehearsed, schedule, evaluations, plan)
    elif alike:
        basis, by_part = "earlier runs", earlier_seconds(alike, work, schedule, evaluations)
    host, gpu = memory_bytes(plan, work, rehearsed, alike)
    checkpoint, disk, state = _sizes(plan, work.sizes, measured)
    if by_part and not work.simple_models:
        by_part["simple_models"] = 0.0
    seconds = round(sum(by_part.values()), 1) if by_part else None
    startup_s, lead_s = by_part.get("startup", 0.0), expected_stop_lead_s(rehearsed, alike)
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
    return checkpoint, disk, sizes.state / shares(plan)


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
        if shares(plan) > 1:
            notes.append("memory of shards is computed from that of one process that held the whole model")
        return tuple(notes)
    return ()


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
    lines = [f"forecast{source}: {plural(e.total_steps, 'step')}, {duration}; {', '.join(parts)}{size}"]
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
