"""What a run was given and what it used: its attempts by its own events, its jobs by Slurm's accounting where there is one.

`timeline` reads `events.jsonl`; `used` reads rows of `sacct`, as `seff` does: processor time over allocated cores and wall time, and the largest
resident set that a task reached. Energy is what Slurm's plugin measured (`AcctGatherEnergyType`), mostly whole nodes; without one it is 0 and left
out. Nothing here asks Slurm (`afina.slurm.accounting` does).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["FIELDS", "AttemptTimes", "Used", "job_ids", "timeline", "used"]

#: What is asked of sacct.
FIELDS = (
    "JobID",
    "State",
    "ElapsedRaw",
    "TimelimitRaw",
    "TotalCPU",
    "AllocCPUS",
    "NNodes",
    "ReqMem",
    "MaxRSS",
    "ConsumedEnergyRaw",
    "AllocTRES",
)
_UNITS_GB = {"K": 1 / 1024**2, "M": 1 / 1024, "G": 1.0, "T": 1024.0}


@dataclass(frozen=True)
class AttemptTimes:
    """When one attempt did what, in seconds since 1970 as its node saw them; None for what it did not reach.

    Attributes:
        step: the step it began at.
        saves, save_s, stall_s: checkpoints, the seconds of writing them, the seconds that the training stood still for them.
        outcome: finished, stopped, failed, or None where nobody wrote it down.
        newest_step: the last one that an event names.
    """

    name: str
    started: float | None = None
    training: float | None = None
    first_step: float | None = None
    last: float | None = None
    step: int | None = None
    newest_step: int | None = None
    saves: int = 0
    save_s: float = 0.0
    stall_s: float = 0.0
    outcome: str | None = None


@dataclass(frozen=True)
class Used:
    """One job, or one start of a job that was put back into the queue. None: Slurm does not say.

    Attributes:
        cpu_s: processor time of all its steps. cpu_share: of the cores that it had.
        memory_gb: the largest resident set of a task. asked_memory_gb: per node, or what all cores together were given.
        energy_j: joules.
    """

    job: str
    state: str
    elapsed_s: float
    limit_min: float | None
    cpus: int
    nodes: int
    gpus: int
    cpu_s: float | None
    cpu_share: float | None
    asked_memory_gb: float | None
    memory_gb: float | None
    energy_j: float | None


def timeline(events: Iterable[Mapping[str, Any]]) -> list[AttemptTimes]:
    """The attempts in the order in which they started."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        name, when, kind = event.get("attempt"), event.get("time"), event.get("event")
        if not isinstance(name, str) or not isinstance(when, int | float):
            continue
        attempt = found.setdefault(name, {"name": name, "saves": 0, "save_s": 0.0, "stall_s": 0.0})
        attempt["last"] = max(when, attempt.get("last", when))
        if isinstance(step := event.get("step"), int):
            attempt["newest_step"] = max(step, attempt.get("newest_step", step))
        if kind == "attempt_started":
            attempt.setdefault("started", when)
        elif kind == "training":
            attempt.setdefault("training", when)
            attempt.setdefault("step", event.get("step"))
        elif kind == "first_step":
            attempt.setdefault("first_step", when)
        elif kind == "checkpoint":
            attempt["saves"] += 1
            attempt["save_s"] += float(event.get("seconds") or 0)
            attempt["stall_s"] += float(event.get("stall_s") or 0)
        elif kind == "attempt_ended":
            attempt["outcome"] = event.get("outcome")
        elif kind == "finished":
            attempt["outcome"] = "finished"
    return [AttemptTimes(**attempt) for attempt in found.values()]


def job_ids(submissions: Iterable[Mapping[str, Any]], attempts: Iterable[str]) -> list[str]:
    """The Slurm jobs of a run: those that were submitted for it, and those that its attempts are named after (`<job>.<restart>`)."""
    named = [match[1] for name in attempts if (match := re.fullmatch(r"(\d+(?:_\d+)?)\.\d+", name))]
    given = [str(s["job_id"]) for s in submissions if s.get("job_id")]
    # A run that was claimed inside its job was never submitted: only its attempts name the job.
    return list(dict.fromkeys(given or named))


def used(rows: Sequence[Mapping[str, str]]) -> list[Used]:
    """Rows of `sacct --parsable2 --duplicates` with `FIELDS` to one value per start of a job.

    Rows of steps (`12.batch`, `12.0`) follow the row of their job.
    """
    jobs: list[tuple[Mapping[str, str], list[Mapping[str, str]]]] = []
    for row in rows:
        if "." in row.get("JobID", "") and jobs:
            jobs[-1][1].append(row)
        elif row.get("JobID"):
            jobs.append((row, []))
    return [_used(job, steps) for job, steps in jobs]


def _used(job: Mapping[str, str], steps: Sequence[Mapping[str, str]]) -> Used:
    elapsed, cpus, nodes = (
        _number(job.get("ElapsedRaw")) or 0.0,
        _whole(job.get("AllocCPUS")),
        _whole(job.get("NNodes")),
    )
    cpu = _seconds(job.get("TotalCPU"))
    rss = [size for step in steps if (size := _gigabytes(step.get("MaxRSS"))) is not None]
    energy = max((_number(row.get("ConsumedEnergyRaw")) or 0.0 for row in (job, *steps)), default=0.0)
    tres = dict(item.partition("=")[::2] for item in (job.get("AllocTRES") or "").split(","))
    return Used(
        job=job["JobID"],
        state=(job.get("State") or "UNKNOWN").split()[0],
        elapsed_s=elapsed,
        limit_min=_number(job.get("TimelimitRaw")),
        cpus=cpus,
        nodes=nodes,
        gpus=_whole(tres.get("gres/gpu")),
        cpu_s=cpu,
        cpu_share=cpu / (elapsed * cpus) if cpu is not None and elapsed and cpus else None,
        asked_memory_gb=_asked(job.get("ReqMem"), cpus, tres, nodes),
        memory_gb=max(rss) if rss else None,
        # 0: no plugin measures it. Slurm's NO_VAL: 2^32 - 2, or close to 2^64.
        energy_j=energy if 0 < energy < 1e15 and energy != 2**32 - 2 else None,
    )


def _asked(text: str | None, cpus: int, tres: Mapping[str, str], nodes: int) -> float | None:
    """GB per node. Before Slurm 21.08 the size ends with `n` (per node) or `c` (per core); 0 means all that the node has."""
    match = re.fullmatch(r"([\d.]+[KMGT]?)([nc]?)", text or "")
    size = _gigabytes(match[1]) if match else None
    if match and size and match[2] == "c":
        return size * cpus / max(1, nodes)
    if not size:
        whole = _gigabytes(tres.get("mem"))
        return whole / max(1, nodes) if whole else None
    return size


def _gigabytes(text: str | None) -> float | None:
    match = re.fullmatch(r"([\d.]+)([KMGT]?)", text or "")
    return float(match[1]) * (_UNITS_GB[match[2]] if match[2] else 1 / 1024**3) if match else None


def _seconds(text: str | None) -> float | None:
    """`[D-[HH:]]MM:SS[.mmm]`."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text or "")
    if match is None:
        return None
    days, hours, minutes, rest = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:  # UNLIMITED, Partition_Limit
        return None


def _whole(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
