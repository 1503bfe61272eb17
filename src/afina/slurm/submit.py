"""Submit with sbatch, as a transaction: a job whose answer is lost is found again, and none is queued twice.

Before sbatch is called, its intent goes into `intent.json` of the run's (sweep's, prediction's) folder, with a token that the job
carries in its comment. The intent is removed when the job is recorded, or when sbatch has refused. If the answer is lost
("Socket timed out", a killed process), the token finds the job; while Slurm does not answer, nothing is submitted again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from afina.files import encode_words, read_json, write_atomic
from afina.redact import redact_settings
from afina.run.commands import sbatch_argv, sweep_argv
from afina.run.directory import RunDir, task_of
from afina.run.plan import Plan
from afina.slurm.client import AMBIGUOUS, run_command
from afina.slurm.cluster import read_config
from afina.slurm.query import NEW_S, is_unseen, query

__all__ = [
    "check_not_queued",
    "max_array_size",
    "forget",
    "recover",
    "site_variables",
    "submit_array",
    "submit_sbatch",
    "submitted",
    "uninterrupted",
]

INTENT = "intent.json"
#: Seconds between the questions for a job whose answer was lost; a busy slurmctld may carry it out later still.
_PAUSES_S = (1, 5, 15)
_LATE_S = 120.0
#: `18`, `18;gpu`, and what sbatch prints where a wrapper drops `--parsable`.
_JOB_ID = re.compile(r"(?:Submitted batch job )?([0-9]+)(?:;(.+)| on cluster (.+))?")


def submit_sbatch(plan: Plan, run: RunDir) -> str:
    """Submit `slurm/finetune.sbatch` for this run; returns the job id.

    Raises:
        SlurmError: no sbatch on PATH, or Slurm refused; with its own message. With the cause `AMBIGUOUS` the job may be queued.
    """
    argv = sbatch_argv(plan, run.path)
    with submitted(plan, argv, {run.path: {}}) as job_id:
        run.append("submissions.jsonl", {"job_id": job_id, "via": "sbatch", "argv": [redact_settings(w) for w in argv]})
    return job_id


def submit_array(plan: Plan, runs: Sequence[RunDir], home: Path) -> str:
    """Submit runs with the same resources as one job array; returns its job id. Task n is the n-th run.

    Args:
        plan: of one of them.
        home: a folder that is made for the array: the list of its runs, and the logs of its tasks.

    Raises:
        SlurmError: as `submit_sbatch`.
    """
    logs = home / "logs"
    logs.mkdir(mode=0o700, parents=True)
    write_atomic(home / "cells", encode_words(str(run.path) for run in runs))
    write_atomic(home / "finetune.sbatch", (runs[0].path / "finetune.sbatch").read_bytes())
    argv = sweep_argv(plan, home, range(len(runs)))
    with submitted(plan, argv, {run.path: {"task": task} for task, run in enumerate(runs)}) as job_id:
        for task, run in enumerate(runs):
            log = logs / f"{job_id.partition(';')[0]}_{task}.out"
            run.append("submissions.jsonl", {"job_id": task_of(job_id, task), "via": "sbatch", "log": str(log)})
    return job_id


@contextlib.contextmanager
def submitted(plan: Plan, argv: Sequence[str], records: Mapping[Path, Mapping[str, Any]]) -> Iterator[str]:
    """Run `argv`, an `sbatch --parsable …`, with the variables of the plan's site; the block records the job, whose id it gets.

    Args:
        records: the folders that get the intent, and what is kept with it, for `recover`.

    Ctrl-C waits until the job is recorded. The id is `18`, or `18;gpu` where the job went to another cluster.

    Raises:
        SlurmError: as `submit_sbatch`.
    """
    token, variables = secrets.token_hex(6), site_variables(plan)
    clusters = _clusters(argv, variables)
    script = next((word for word in argv[1:] if not word.startswith("-")), "")
    intent = {"time": time.time(), "token": token, "script": script, "clusters": clusters}
    with uninterrupted():
        for folder, record in records.items():
            write_atomic(folder / INTENT, json.dumps({**intent, "record": dict(record)}) + "\n")
        try:
            job_id = _job_id(run_command(_with_token(plan, argv, token, variables), env=variables))
        except SlurmError as error:
            if error.cause != AMBIGUOUS:
                forget(*records)
                raise
            folder = next(iter(records))
            queued = _find_patiently(folder, intent)
            if queued is None:
                raise SlurmError(
                    f"{error.message}; the job may be in the queue all the same, so {folder} is kept",
                    "repeat the command when `squeue --me` answers: it looks for the job before it submits one; for a run: "
                    + shlex.join(["afina", "submit", str(folder)]),
                    cause=AMBIGUOUS,
                ) from None
            job_id = queued
        yield job_id
        forget(*records)


def _job_id(answer: str) -> str:
    """The job in sbatch's answer: the line that is a number alone, among what a site's wrapper or plugin prints.

    Raises:
        SlurmError: there is none, or several; with the cause `AMBIGUOUS`.
    """
    ids = [match for line in answer.splitlines() if (match := _JOB_ID.fullmatch(line.strip()))]
    if len(ids) != 1:
        raise SlurmError(
            f"sbatch answered {answer.strip()!r} instead of a job id", "see `squeue --me` for the job", cause=AMBIGUOUS
        )
    number, cluster = ids[0][1], ids[0][2] or ids[0][3]
    return f"{number};{cluster}" if cluster else number


def recover(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The job of a submission whose answer was lost, and the record of its intent; None where no such job is in the queue.

    The caller records the job, and then removes the intent with `forget`.

    Raises:
        SlurmError: Slurm does not answer, or the submission was less than two minutes ago and may still be carried out.
    """
    intent = read_json(folder / INTENT)
    if not intent:
        return None
    job_id = _find(folder, intent)
    if job_id is not None:
        return job_id, dict(intent.get("record") or {})
    if (late := _LATE_S - _age_s(folder / INTENT)) > 0:
        raise SlurmError(
            f"{folder}: sbatch gave no answer a moment ago, and its job may still come",
            f"repeat the command in {late:.0f} s",
            cause=AMBIGUOUS,
        )
    forget(folder)
    return None


def _age_s(path: Path) -> float:
    """Seconds since a file was written, by the clock of its file system: the node that wrote it may have another than this one."""
    probe = path.with_name(f".{path.name}.now")
    probe.touch()
    age = probe.stat().st_mtime - path.stat().st_mtime
    probe.unlink(missing_ok=True)
    return age


def forget(*folders: Path) -> None:
    """Remove the intent of a submission that is recorded, or refused."""
    for folder in folders:
        (folder / INTENT).unlink(missing_ok=True)


def check_not_queued(run: RunDir) -> None:
    """Refuse to submit a run again while one of its jobs is, or may be, in the queue.

    Raises:
        SlurmError: Slurm does not answer; with its own words.
        InputError: a job is queued or running.
    """
    if (recovered := recover(run.path)) is not None:
        job_id, record = recovered
        job_id = task_of(job_id, record["task"]) if "task" in record else job_id
        run.append("submissions.jsonl", {"job_id": job_id, "via": "recovered"})
        forget(run.path)
    ids = run.job_ids()
    jobs = query(ids, account=ids[-1:])
    for job in jobs.values():
        if job.state == "UNKNOWN":
            raise SlurmError(
                f"{run.path}: a job of this run may be queued or running, and Slurm does not answer: {job.reason}",
                "repeat the command when `squeue --me` answers: a second job would train beside the first",
                cause=AMBIGUOUS,
            )
        if job.state != "GONE":
            raise InputError(f"{run.path}: job {job.job_id} of this run is {job.state}", "nothing to submit")
    newest = next(reversed(jobs.values()), None)
    submitted_s = time.time() - max(
        (float(line.get("time") or 0) for line in run.lines("submissions.jsonl")), default=0
    )
    if newest is not None and is_unseen(newest, submitted_s, run.attempt_names()):
        raise SlurmError(
            f"{run.path}: job {newest.job_id} was submitted {submitted_s:.0f} s ago, and squeue does not show it yet",
            f"repeat the command in {NEW_S - submitted_s:.0f} s",
            cause=AMBIGUOUS,
        )


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


def _find_patiently(folder: Path, intent: Mapping[str, Any]) -> str | None:
    for pause in _PAUSES_S:
        time.sleep(pause)
        with contextlib.suppress(SlurmError):
            if (job_id := _find(folder, intent)) is not None:
                return job_id
    return None


def _find(folder: Path, intent: Mapping[str, Any]) -> str | None:
    """The job of a submission, the number of an array, or of a job: by the token in its comment.

    Where the site replaces comments, by its script: of jobs that were submitted since, and are not recorded.

    Raises:
        SlurmError: squeue does not answer.
    """
    token, script = f"afina:{intent.get('token')}", f"{intent.get('script') or '?'}"
    since = float(intent.get("time") or 0) - _LATE_S
    recorded = {str(line.get("job_id")) for line in RunDir(folder).lines("submissions.jsonl")}
    where = [f"--clusters={intent['clusters']}"] if intent.get("clusters") else []
    # With its header: only then squeue prints of which cluster the lines are.
    argv = ["squeue", "--me", "--states=all", "--format=%F|%V|%o|%k", *where]
    cluster = ""
    for line in run_command(argv, env={"SLURM_TIME_FORMAT": "%s"}, timeout_s=30.0).splitlines():
        if line.startswith("CLUSTER: "):
            cluster = line[9:].strip()
        number, _, about = line.strip().partition("|")
        submitted_at, _, about = about.partition("|")
        job_id = f"{number};{cluster}" if cluster else number
        if not number.isdigit():
            continue
        if about.endswith(token):
            return job_id
        replaced = about.startswith(script) and "afina:" not in about.rpartition(script)[2]
        if replaced and submitted_at.isdigit() and int(submitted_at) > since and job_id not in recorded:
            return job_id
    return None
