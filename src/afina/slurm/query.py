"""State of jobs, from one squeue and at most one sacct for any number of them; and scancel.

A query that fails gives UNKNOWN, never FAILED: clusters without accounting have no sacct, and a busy slurmctld does not answer.

Not covered: jobs of other users.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from afina.errors import SlurmError
from afina.files import read_words
from afina.recipe.time_limit import parse_seconds
from afina.slurm.client import of_cluster, run_command, try_command

__all__ = ["NEW_S", "Job", "JobState", "cancel", "is_unseen", "jobs_below", "query", "queue_answers", "run_of_job"]

JobState = Literal["PENDING", "RUNNING", "GONE", "UNKNOWN"]

#: Slurm's states -> ours; any other (RUNNING, COMPLETING, SIGNALING, STAGE_OUT, …) is RUNNING.
_STATES: dict[str, JobState] = {
    **dict.fromkeys(
        (
            "PENDING",
            "CONFIGURING",
            "REQUEUED",
            "REQUEUE_FED",
            "REQUEUE_HOLD",
            "SPECIAL_EXIT",
            "SUSPENDED",
            "STOPPED",
            "RESV_DEL_HOLD",
        ),
        "PENDING",
    ),
    "REVOKED": "RUNNING",  # another cluster of the federation runs it
    **dict.fromkeys(
        (
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
            "TIMEOUT",
        ),
        "GONE",
    ),
}
#: A job that was submitted less long ago may be missing in squeue's answer: some sites serve one that is a minute old.
NEW_S = 120.0
#: One argument of a command may have 131,072 bytes on Linux.
_MAX_IDS = 5000
#: The batch scripts in a run directory: of sbatch and of submitit.
_OF_A_RUN = re.compile(r"(/.*?)/(?:finetune\.sbatch|submitit/\.submission_file_)")
#: Somebody waits at a screen for the answer.
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Job:
    """A job as Slurm knows it.

    Attributes:
        job_id: as in the query: `123`, or `123_4` for a task of an array.
        state: PENDING, RUNNING, GONE (it has left the queue) or UNKNOWN (Slurm does not answer).
        slurm_state: Slurm's own name of the state, e.g. COMPLETING, TIMEOUT, CANCELLED; empty where it is not known.
        reason: why it waits, in Slurm's word; `afina.slurm.reasons` explains it. Of UNKNOWN: what squeue answered.
        time_left_s: seconds to its time limit.
        start: when it started, or when Slurm expects it to start, in seconds since the epoch.
        nodes: the nodes that it runs on, as Slurm abbreviates them.
    """

    job_id: str
    state: JobState
    slurm_state: str = ""
    reason: str = ""
    time_left_s: int | None = None
    start: float | None = None
    nodes: str = ""


def query(job_ids: Collection[str], *, account: Collection[str] | None = None) -> dict[str, Job]:
    """The state of each job in Slurm.

    Args:
        job_ids: `123`, `123_4` for a task of an array, `123;gpu` on another cluster. A task that runs can also be named by its own
            SLURM_JOB_ID.
        account: ask sacct how these ended; by default all. Without accounting their `slurm_state` stays empty.
    """
    if not job_ids:
        return {}
    # Times as seconds since the epoch: no time zone, no hour that comes twice.
    argv = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%A|%T|%L|%S|%N|%r"]
    jobs: dict[str, Job] = {}
    for where, numbers in _by_cluster(job_ids).items():
        try:
            answer = run_command([*argv, *where], env={"SLURM_TIME_FORMAT": "%s"}, timeout_s=_TIMEOUT_S)
        except SlurmError as error:
            jobs |= {job_id: Job(job_id, "UNKNOWN", reason=error.message) for job_id in numbers.values()}
            continue
        queued = _queued(answer)
        missing = [number for number in numbers if number not in queued]
        ended = _final_states([n for n in missing if account is None or numbers[n] in account], where)
        for number, job_id in numbers.items():
            known = queued.get(number) or Job(number, "GONE", ended.get(number, ""))
            jobs[job_id] = replace(known, job_id=job_id if ";" in job_id else known.job_id)
    return {job_id: jobs[job_id] for job_id in job_ids}


def jobs_below(folders: Collection[Path]) -> dict[Path, tuple[str, ...]]:
    """Jobs in the queue that are of these run directories, there or not; empty where squeue does not answer.

    Their batch script lies in the run directory; that of an array in a folder with the list of its runs.
    """
    jobs = _works()
    below = {path: tuple(number for number, work in jobs if f"{work}/".startswith(f"{path}/")) for path in folders}
    return {path: numbers for path, numbers in below.items() if numbers}


def run_of_job(number: str) -> Path | None:
    """The run directory of a job in the queue, there or not; None where there is no such job, or squeue does not answer."""
    match = next((_OF_A_RUN.match(work) for job, work in _works() if job == number), None)
    return Path(match[1]) if match else None


def _works() -> list[tuple[str, str]]:
    """Each job in the queue, or task of an array, and what `_work_of` says of it."""
    answer = try_command(["squeue", "--me", "--noheader", "--array", "--format=%i|%o"], timeout_s=_TIMEOUT_S) or ""
    lines = [line.strip().partition("|") for line in answer.splitlines() if "|" in line]
    return [(number, _work_of(number, command)) for number, _, command in lines]


def _work_of(number: str, command: str) -> str:
    """The command of a job; of an array's task that of its run alone, from the array's list (as `finetune.sbatch` finds it)."""
    folder, _, arguments = command.partition("/finetune.sbatch ")
    task, first = number.partition("_")[2], arguments.removeprefix(folder).strip() or "0"
    with contextlib.suppress(OSError, IndexError, ValueError):
        return f"{read_words(Path(folder) / 'cells')[int(first) + int(task)]}/finetune.sbatch"
    return command


def is_unseen(job: Job, submitted_s: float, attempts: Sequence[str]) -> bool:
    """True of a job of which nothing is known, that was submitted so many seconds ago and has begun no attempt: it may still show up."""
    begun = any(name.startswith(f"{of_cluster(job.job_id)[0]}.") for name in attempts)
    return job.state == "GONE" and not job.slurm_state and not begun and 0 <= submitted_s < NEW_S


def queue_answers() -> bool:
    """True where squeue works."""
    return try_command(["squeue", "--noheader", "--me", "--format=%i"]) is not None


def cancel(*job_ids: str) -> None:
    """Cancel jobs with one scancel; a job that has ended meanwhile is not an error.

    Raises:
        SlurmError: Slurm refused.
    """
    for where, numbers in _by_cluster(job_ids).items():
        run_command(["scancel", *where, *numbers])


def _by_cluster(job_ids: Collection[str]) -> dict[tuple[str, ...], dict[str, str]]:
    """Slurm's option for each cluster -> its jobs, by their numbers there."""
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for job_id in job_ids:
        number, where = of_cluster(job_id)
        groups.setdefault(tuple(where), {})[number] = job_id
    return groups


def _queued(answer: str) -> dict[str, Job]:
    """squeue's lines by job id; lines that it did not write (a wrapper's greeting) are left out."""
    jobs: dict[str, Job] = {}
    for line in answer.splitlines():
        fields = line.strip().split("|", 6)
        if len(fields) < 7:
            continue
        job_id, own_id, state, left, start, nodes, reason = fields
        left_s = parse_seconds(left)
        jobs[job_id] = Job(
            job_id,
            _STATES.get(state, "RUNNING"),
            state,
            reason,
            None if left_s is None else int(left_s),
            float(start) if start.strip().isdigit() else None,
            nodes,
        )
        # Tasks of an array that have not begun share its number; the last one to begin keeps it as its own.
        jobs.setdefault(own_id, jobs[job_id])
    return jobs


def _final_states(job_ids: Sequence[str], where: Sequence[str] = ()) -> dict[str, str]:
    """How jobs ended according to sacct: COMPLETED, TIMEOUT, CANCELLED, …; empty without accounting."""
    ended: dict[str, str] = {}
    argv = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,JobIDRaw,State", *where]
    for first in range(0, len(job_ids), _MAX_IDS):
        answer = try_command([*argv, f"--jobs={','.join(job_ids[first : first + _MAX_IDS])}"], timeout_s=_TIMEOUT_S)
        if answer is None:
            return ended
        for line in answer.splitlines():
            fields = line.split("|")
            if len(fields) == 3 and fields[2].split():
                state = fields[2].split()[0]  # `CANCELLED by 1000`
                ended[fields[0]] = state
                ended.setdefault(fields[1], state)
    return ended
