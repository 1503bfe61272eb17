"""Resource use of jobs, from Slurm's accounting: processor time, memory, energy.

As `seff` counts: processor time over allocated cores and wall time, and the largest resident set that a task reached. Energy is
what Slurm's plugin measured (`AcctGatherEnergyType`), usually of whole nodes; without a plugin it is 0 and left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from afina.recipe.time_limit import parse_seconds
from afina.slurm.client import of_cluster, try_command

__all__ = ["JobUsage", "accounting_works", "job_usage", "parse_usage"]

_FIELDS = (
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
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class JobUsage:
    """One job, or one start of a requeued job. None: Slurm does not tell.

    Attributes:
        cpu_s: processor time of all its steps; cpu_share: of its cores' time.
        memory_bytes: the largest resident set of a task; asked_memory_bytes: requested per node.
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
    asked_memory_bytes: float | None
    memory_bytes: float | None
    energy_j: float | None


def job_usage(job_ids: Sequence[str]) -> list[JobUsage] | None:
    """The use of these jobs, one value per start of a job; None without accounting."""
    if not job_ids:
        return None
    numbers = [of_cluster(job_id) for job_id in job_ids]
    what = [f"--format={','.join(_FIELDS)}", f"--jobs={','.join(number for number, _ in numbers)}", *numbers[-1][1]]
    answer = try_command(["sacct", "--duplicates", "--noheader", "--parsable2", *what], timeout_s=120.0)
    if answer is None:
        return None
    rows = [line.split("|") for line in answer.splitlines()]
    return parse_usage([dict(zip(_FIELDS, row, strict=True)) for row in rows if len(row) == len(_FIELDS)])


def accounting_works() -> bool:
    """True where sacct works."""
    argv = ["sacct", "--noheader", "--allocations", "--starttime=now-1hours", "--format=JobID"]
    return try_command(argv) is not None


def parse_usage(rows: Sequence[Mapping[str, str]]) -> list[JobUsage]:
    """One value per start of a job, from rows of sacct by the names of their fields.

    Rows of steps (`12.batch`, `12.0`) follow the row of their job.
    """
    jobs: list[tuple[Mapping[str, str], list[Mapping[str, str]]]] = []
    for row in rows:
        if "." in row.get("JobID", "") and jobs:
            jobs[-1][1].append(row)
        elif row.get("JobID"):
            jobs.append((row, []))
    return [_usage(job, steps) for job, steps in jobs]


def _usage(job: Mapping[str, str], steps: Sequence[Mapping[str, str]]) -> JobUsage:
    elapsed, cpus, nodes = (
        _number(job.get("ElapsedRaw")) or 0.0,
        _whole(job.get("AllocCPUS")),
        _whole(job.get("NNodes")),
    )
    cpu = parse_seconds(job.get("TotalCPU") or "")
    rss = [size for step in steps if (size := _bytes(step.get("MaxRSS"))) is not None]
    energy = max((_number(row.get("ConsumedEnergyRaw")) or 0.0 for row in (job, *steps)), default=0.0)
    tres = dict(item.partition("=")[::2] for item in (job.get("AllocTRES") or "").split(","))
    return JobUsage(
        job=job["JobID"],
        state=(job.get("State") or "UNKNOWN").split()[0],
        elapsed_s=elapsed,
        limit_min=_number(job.get("TimelimitRaw")),
        cpus=cpus,
        nodes=nodes,
        gpus=_whole(tres.get("gres/gpu")),
        cpu_s=cpu,
        cpu_share=cpu / (elapsed * cpus) if cpu is not None and elapsed and cpus else None,
        asked_memory_bytes=_requested_bytes(job.get("ReqMem"), cpus, tres, nodes),
        memory_bytes=max(rss) if rss else None,
        # 0: no plugin measures it. Slurm's NO_VAL: 2^32 - 2, or close to 2^64.
        energy_j=energy if 0 < energy < 1e15 and energy != 2**32 - 2 else None,
    )


def _requested_bytes(text: str | None, cpus: int, tres: Mapping[str, str], nodes: int) -> float | None:
    """Bytes per node. Before Slurm 21.08 the size ends with `n` (per node) or `c` (per core); 0 means all that the node has."""
    match = re.fullmatch(r"([\d.]+[KMGT]?)([nc]?)", text or "")
    size = _bytes(match[1]) if match else None
    if match and size and match[2] == "c":
        return size * cpus / max(1, nodes)
    if not size:
        whole = _bytes(tres.get("mem"))
        return whole / max(1, nodes) if whole else None
    return size


def _bytes(text: str | None) -> float | None:
    match = re.fullmatch(r"([\d.]+)([KMGT]?)", text or "")
    return float(match[1]) * _UNITS[match[2]] if match else None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:  # UNLIMITED, Partition_Limit
        return None


def _whole(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
