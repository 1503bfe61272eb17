"""Cancel runs: jobs by scancel, a training outside of Slurm by the stop file in its run directory.

Either way a run that trains stops at its next step with a checkpoint, and can be resumed. One call of squeue and one of scancel
serve any number of runs. It does not wait until they have stopped: `afina status` shows that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from afina.errors import EnvironmentProblem, SlurmError
from afina.run.directory import RunDir
from afina.slurm.query import cancel, query
from afina.watch.overview import read_runs
from afina.watch.reading import Reading

__all__ = ["Cancellation", "cancel_runs"]


@dataclass(frozen=True)
class Cancellation:
    """The result for one run.

    Attributes:
        run: the run directory.
        did: `cancelled` (its jobs), `asked` (a training outside of Slurm, by its stop file), or `nothing`.
        job_ids: the jobs that were cancelled.
        message: the same in words.
    """

    run: Path
    did: Literal["cancelled", "asked", "nothing"]
    job_ids: tuple[str, ...]
    message: str

    def to_dict(self) -> dict[str, Any]:
        return {"run": str(self.run), "did": self.did, "job_ids": list(self.job_ids), "message": self.message}


def cancel_runs(paths: Sequence[Path]) -> list[Cancellation]:
    """Cancel the jobs of these runs, and ask those that train outside of Slurm to stop.

    Raises:
        SlurmError: Slurm does not answer, or refused; trainings outside of Slurm have been asked to stop even so.
        EnvironmentProblem: a stop file cannot be written.
    """
    readings = read_runs(paths)
    stopping = {reading.path: _ask_to_stop(reading) for reading in readings}
    ids = {reading.path: reading.job_ids for reading in readings if not reading.result.finished}
    jobs = query(list(dict.fromkeys(job for job_ids in ids.values() for job in job_ids)), account=())
    if unknown := [job for job in jobs.values() if job.state == "UNKNOWN"]:
        raise SlurmError(
            f"Slurm does not answer: nothing was cancelled; {unknown[0].reason}",
            "try again, or use scancel with the job's number",
        )
    live = {
        path: tuple(job for job in job_ids if jobs[job].state in ("PENDING", "RUNNING"))
        for path, job_ids in ids.items()
    }
    cancel(*dict.fromkeys(job for job_ids in live.values() for job in job_ids))
    for path, job_ids in live.items():
        if job_ids and path.exists():
            RunDir(path).event("cancelled", job_ids=list(job_ids))
    return [_result(reading, live.get(reading.path, ()), stopping[reading.path]) for reading in readings]


def _ask_to_stop(reading: Reading) -> bool:
    """Write the stop file of a training outside of Slurm; False if there is none."""
    local = str(reading.lease.get("attempt", "")).startswith("local-")
    if not local or reading.liveness not in ("alive", "fresh"):
        return False
    stop = reading.path / "stop"
    try:
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(stop, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, b"asked\n")
            os.close(descriptor)
    except OSError as error:
        raise EnvironmentProblem(
            f"{stop}: {error.strerror}", "free space, or stop it with Ctrl-C where it runs"
        ) from None
    return True


def _result(reading: Reading, job_ids: tuple[str, ...], stopping: bool) -> Cancellation:
    if job_ids:
        return Cancellation(reading.path, "cancelled", job_ids, f"cancelled job {', '.join(job_ids)}")
    if stopping:
        host, pid = reading.lease.get("host"), reading.lease.get("pid")
        message = f"asked attempt {reading.lease.get('attempt')} (process {pid} on {host}) to stop at its next step, with a checkpoint"
        return Cancellation(reading.path, "asked", (), message)
    why = "it has finished" if reading.result.finished else "none of its jobs is queued or running"
    return Cancellation(reading.path, "nothing", (), f"nothing to cancel: {why}")
