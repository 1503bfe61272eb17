"""Submit with sbatch, as a transaction: a job whose answer is lost is found again, and none is queued twice.

Before sbatch is called, its intent goes into `intent.json` of the run's (sweep's, prediction's) folder, with a token that the job
carries in its comment. The intent is removed when the job is recorded, or when sbatch has refused. If the answer is lost
("Socket timed out", a killed process), the token finds the job; while Slurm does not answer, nothing is submitted again.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from afina.errors import InputError, SlurmError
from afina.files import read_json, write_atomic
from afina.redact import redact_settings
from afina.run.commands import sbatch_argv
from afina.run.directory import RunDir
from afina.run.plan import Plan
from afina.slurm.client import AMBIGUOUS, run_command
from afina.slurm.cluster import read_config
from afina.slurm.query import query

__all__ = [
    "check_not_queued",
    "max_array_size",
    "forget",
    "recover",
    "site_variables",
    "submit_sbatch",
    "submitted",
    "uninterrupted",
]

INTENT = "intent.json"
#: Seconds between the questions for a job whose answer was lost; a busy slurmctld may carry it out later still.
_PAUSES_S = (1, 5, 15)
_LATE_S = 120.0


def submit_sbatch(plan: Plan, run: RunDir) -> str:
    """Submit `slurm/finetune.sbatch` for this run; returns the job id.

    Raises:
        SlurmError: no sbatch on PATH, or Slurm refused; with its own message. With the cause `AMBIGUOUS` the job may be queued.
    """
    argv = sbatch_argv(plan, run.path)
    with submitted(plan, argv, run.path) as job_id:
        run.append("submissions.jsonl", {"job_id": job_id, "via": "sbatch", "argv": [redact_settings(w) for w in argv]})
    return job_id


@contextlib.contextmanager
def submitted(plan: Plan, argv: Sequence[str], folder: Path, record: Mapping[str, Any] = {}) -> Iterator[str]:
    """Run `argv`, an `sbatch --parsable …`, with the variables of the plan's site; the block records the job, whose id it gets.

    Args:
        folder: for the intent.
        record: kept with the intent, for `recover`.

    Ctrl-C waits until the job is recorded. The id is `18`, or `18;gpu` where the job went to another cluster.

    Raises:
        SlurmError: as `submit_sbatch`.
    """
    token, variables = secrets.token_hex(6), site_variables(plan)
    clusters = _clusters(argv, variables)
    intent = {"time": time.time(), "token": token, "clusters": clusters, "record": dict(record)}
    with uninterrupted():
        write_atomic(folder / INTENT, json.dumps(intent) + "\n")
        try:
            answer = run_command(_with_token(plan, argv, token, variables), env=variables).strip()
        except SlurmError as error:
            if error.cause != AMBIGUOUS:
                (folder / INTENT).unlink()
                raise
            job_id = _find_patiently(token, clusters)
            if job_id is None:
                raise SlurmError(
                    f"{error.message}; the job may be in the queue all the same, so {folder} is kept",
                    "repeat the command when `squeue --me` answers: it looks for the job before it submits one; for a run: "
                    + shlex.join(["afina", "submit", str(folder)]),
                    cause=AMBIGUOUS,
                ) from None
        else:
            job_id = (answer.splitlines() or [""])[-1]
            if not job_id.partition(";")[0].isdigit():
                (folder / INTENT).unlink()
                raise SlurmError(
                    f"sbatch answered {answer!r} instead of a job id", "check with `squeue --me` for the job"
                )
        yield job_id
        (folder / INTENT).unlink()


def recover(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The job of a submission whose answer was lost, and the record of its intent; None where no such job is in the queue.

    The caller records the job, and then removes the intent with `forget`.

    Raises:
        SlurmError: Slurm does not answer, or the submission was less than two minutes ago and may still be carried out.
    """
    intent = read_json(folder / INTENT)
    if not intent:
        return None
    job_id = _find(str(intent.get("token")), str(intent.get("clusters") or ""))
    if job_id is not None:
        return job_id, dict(intent.get("record") or {})
    if (late := _LATE_S - (time.time() - float(intent.get("time") or 0))) > 0:
        raise SlurmError(
            f"{folder}: sbatch gave no answer a moment ago, and its job may still come",
            f"repeat the command in {late:.0f} s",
            cause=AMBIGUOUS,
        )
    forget(folder)
    return None


def forget(folder: Path) -> None:
    """Remove the intent of a submission that is recorded."""
    (folder / INTENT).unlink(missing_ok=True)


def check_not_queued(run: RunDir) -> None:
    """Refuse to submit a run again while one of its jobs is, or may be, in the queue.

    Raises:
        SlurmError: Slurm does not answer; with its own words.
        InputError: a job is queued or running.
    """
    if (recovered := recover(run.path)) is not None:
        run.append("submissions.jsonl", {"job_id": recovered[0], "via": "recovered"})
        forget(run.path)
    for job in query(run.job_ids(), account=()).values():
        if job.state == "UNKNOWN":
            raise SlurmError(
                f"{run.path}: a job of this run may be queued or running, and Slurm does not answer: {job.reason}",
                "repeat the command when `squeue --me` answers: a second job would train beside the first",
                cause=AMBIGUOUS,
            )
        if job.state != "GONE":
            raise InputError(f"{run.path}: job {job.job_id} of this run is {job.state}", "nothing to submit")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until a submission is recorded; only in the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals: list[int] = []

    def note(number: int, frame: object) -> None:
        signals.append(number)
        os.write(2, b"\nafina: interrupted; waiting for sbatch's answer, to record the job\n")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if signals and sys.exc_info()[0] is None:
            raise KeyboardInterrupt


def max_array_size() -> int:
    """One more than the highest index of an array task here; Slurm's default, 1001, where Slurm does not answer."""
    size = read_config().get("MaxArraySize", "")
    return max(1, int(size)) if size.isdigit() else 1001


def site_variables(plan: Plan) -> dict[str, str]:
    """Variables that sbatch gets beside the caller's, so that the job uses the same site."""
    site = plan.site
    # A value that was redacted in plan.json: the environment may have it still.
    sbatch = {name: value for name, value in site.sbatch.items() if "***" not in value}
    variables = {"AFINA_SCRATCH": str(site.scratch), **sbatch}
    if site.file:
        variables["AFINA_SITE"] = str(site.file)
    if site.image:
        variables["AFINA_IMAGE"] = str(site.image)
    return variables


def _with_token(plan: Plan, argv: Sequence[str], token: str, variables: Mapping[str, str]) -> list[str]:
    """The command with the token at the end of the job's comment, which keeps the site's words."""
    given = [word.partition("=")[2] for word in (*plan.site.sbatch_extra, *argv) if word.startswith("--comment=")]
    words = [word for word in argv if not word.startswith("--comment=")]
    theirs = (given or [variables.get("SBATCH_COMMENT") or os.environ.get("SBATCH_COMMENT", "")])[-1]
    return [*words[:2], f"--comment={f'{theirs} afina:{token}'.lstrip()}", *words[2:]]


def _clusters(argv: Sequence[str], variables: Mapping[str, str]) -> str:
    """The clusters that a submission may go to, if they are named."""
    named = [word.partition("=")[2] for word in argv if word.startswith(("--clusters=", "--cluster="))]
    both = {**os.environ, **variables}
    return (named or [both.get("SBATCH_CLUSTERS") or both.get("SLURM_CLUSTERS") or ""])[-1]


def _find_patiently(token: str, clusters: str) -> str | None:
    for pause in _PAUSES_S:
        time.sleep(pause)
        with contextlib.suppress(SlurmError):
            if (job_id := _find(token, clusters)) is not None:
                return job_id
    return None


def _find(token: str, clusters: str) -> str | None:
    """The job with this token in its comment: the number of an array, or of a job.

    Raises:
        SlurmError: squeue does not answer.
    """
    where = [f"--clusters={clusters}"] if clusters else []
    answer = run_command(["squeue", "--me", "--noheader", "--states=all", "--format=%F|%k", *where], timeout_s=30.0)
    cluster = ""
    for line in answer.splitlines():
        if line.startswith("CLUSTER: "):
            cluster = line[9:].strip()
        number, _, comment = line.strip().partition("|")
        if number.isdigit() and comment.endswith(f"afina:{token}"):
            return f"{number};{cluster}" if cluster else number
    return None
