"""A short real job: sbatch, the batch script, a signal, the image on each node, processes that meet.

`slurm/doctor.sbatch` writes its findings into a folder on scratch. They are read while the job runs, and the folder is removed
with it. An interrupt cancels the job. Most of the time is usually spent in the queue.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from afina.diagnosis.target import Target
from afina.errors import AfinaError, SlurmError
from afina.files import encode_words, write_atomic
from afina.run.commands import container_argv, job_scripts, sbatch_options, worker_argv
from afina.run.plan import Plan
from afina.site.finding import Finding, Level
from afina.slurm.query import Job, cancel, query
from afina.slurm.reasons import explain
from afina.slurm.submit import submitted

__all__ = ["try_job"]

_TIME_MIN = 10
_LEVELS: dict[str, Level] = {"ok": "ok", "warning": "warning", "failed": "failed"}


def try_job(target: Target, *, wait_s: float, progress: Callable[[str], None]) -> Generator[Finding, None, None]:
    """Submit the job and yield its findings as they come.

    Args:
        wait_s: the job is cancelled if it has not begun by then.
        progress: receives a line of text now and then.

    A job that Slurm refuses is a finding. Closing the generator cancels the job.
    """
    plan = target.where
    assert plan is not None and target.site is not None
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=target.site.scratch))
    job: str | None = None
    try:
        argv = _prepare(plan, folder)
        try:
            with submitted(plan, argv, {folder: {}}) as job:
                pass
        except SlurmError as error:
            yield Finding("sbatch", "failed", error.message, error.remedy)
            return
        yield Finding("sbatch", "ok", f"job {job} is submitted")
        yield from _follow(job, folder, wait_s, progress)
    finally:
        if job is not None and not (folder / "over").exists():
            with contextlib.suppress(AfinaError):
                cancel(job)
            _wait_until_gone(job)
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(plan: Plan, folder: Path) -> list[str]:
    """Write the job's folder; returns the submission."""
    count = str(plan.geometry.processes_per_node)
    for name, path in job_scripts(("doctor.sbatch", "finetune.sbatch", "job.sh", "node.sh")).items():
        shutil.copyfile(path, folder / name)
    if plan.site.runtime == "none":
        worker = worker_argv(plan, "check-node", str(folder), count)
    else:
        inner = container_argv(plan, ["python", "-m", "afina.worker", "check-node", str(folder), count])
        worker = ["bash", str(folder / "node.sh"), str(plan.site.image), *inner]
        assert plan.site.image is not None
        about = (str(plan.site.image), str(plan.site.image.stat().st_size), plan.site.runtime)
        (folder / "image").write_bytes(encode_words(about))
    write_atomic(folder / "worker.argv", encode_words(worker))
    changes: dict[str, str | int] = {"job-name": "afina-doctor", "time": min(_TIME_MIN, plan.recipe.resources.time)}
    log = str(folder / "slurm-%j.out") if "%" not in str(folder) else str(folder).replace("%", "%%") + "/slurm-%j.out"
    return [
        "sbatch",
        "--parsable",
        *sbatch_options(plan, changes),
        f"--output={log}",
        str(folder / "doctor.sbatch"),
        str(folder),
    ]


def _follow(job: str, folder: Path, wait_s: float, progress: Callable[[str], None]) -> Iterator[Finding]:
    began, looked = time.monotonic(), 0.0
    read: dict[Path, int] = {}
    started = False
    known = Job(job, "PENDING")
    while True:
        for finding in _new_lines(folder, read):
            started = True
            yield finding
        waited = time.monotonic() - began
        if (folder / "over").exists():
            yield from _new_lines(folder, read)
            return
        if waited - looked > 2:
            looked, known = waited, query([job], account=())[job]
            if known.state == "GONE":
                time.sleep(2)  # a shared file system may show the last lines a little later
                yield from _new_lines(folder, read)
                if not (folder / "over").exists():
                    yield _ended_early(job, folder)
                return
            if known.state == "PENDING" and waited > wait_s:
                why = explain(known.reason, job)
                yield Finding("queue", "failed", f"job {job} still waits after {waited:.0f} s: {why}", why.remedy)
                return
        how = "runs" if started or known.state == "RUNNING" else f"waits: {explain(known.reason, job).words}"
        progress(f"job {job} {how}, {waited:.0f} s")
        time.sleep(0.3)


def _new_lines(folder: Path, read: dict[Path, int]) -> Iterator[Finding]:
    """Findings in whole lines that were not read before."""
    for path in sorted(folder.glob("lines.*")):
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(read.get(path, 0))
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                read[path] = read.get(path, 0) + len(raw)
                fields = raw.decode(errors="replace").rstrip("\n").split("\t")
                if len(fields) == 4 and fields[1] in _LEVELS:
                    yield Finding(fields[0], _LEVELS[fields[1]], fields[2], fields[3])


def _ended_early(job: str, folder: Path) -> Finding:
    logs = [*folder.glob("slurm-*.out"), *folder.glob("log.*")]
    last = [line for log in logs for line in log.read_text(errors="replace").splitlines()[-3:]]
    log = " | ".join(last[-4:]) or "its log is empty: does the node see scratch at this path?"
    return Finding("job", "failed", f"job {job} ended too early: {log}", f"see `scontrol show job {job}`")


def _wait_until_gone(job: str, patience_s: float = 20.0) -> None:
    """A running job would write into the folder while it is removed."""
    ends = time.monotonic() + patience_s
    with contextlib.suppress(SlurmError):
        while query([job], account=())[job].state not in ("GONE", "UNKNOWN") and time.monotonic() < ends:
            time.sleep(0.5)
