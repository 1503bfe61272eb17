"""State and progress of many runs: the files of each and one question to Slurm for all of them.

A run's own files come first. Slurm is asked about runs whose end is not recorded; where it does not answer, the state is UNKNOWN,
never FAILED.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from afina.recipe.metrics import lower_is_better
from afina.recipe.trackers import sync_commands
from afina.run.outcome import ANOTHER_RUN
from afina.slurm.query import Job, is_unseen, jobs_below, query
from afina.slurm.reasons import explain
from afina.watch.reading import Reading, decisive_lines, read_run

__all__ = ["STATES", "RunSummary", "State", "read_runs", "summarise", "summary_of"]

State = Literal["PLANNED", "PENDING", "RUNNING", "FINISHED", "STOPPED", "FAILED", "UNKNOWN"]
STATES: tuple[State, ...] = ("PLANNED", "PENDING", "RUNNING", "FINISHED", "STOPPED", "FAILED", "UNKNOWN")

#: Opening a file on a shared file system waits for its server, so several are opened at a time. On a local disk it gains nothing.
_READERS = 8
#: A start that Slurm expects later than this is not an estimate.
_START_WITHIN_S = 30 * 86400


@dataclass(frozen=True)
class RunSummary:
    """One run at one moment.

    Attributes:
        run: the run directory.
        name: the recipe's name.
        state: PLANNED (claimed, never submitted), PENDING, RUNNING, FINISHED, STOPPED (resumable), FAILED; UNKNOWN where
            neither the files nor Slurm can say.
        step, max_steps: optimizer steps done, and of the whole run.
        epoch, loss: of the last log line.
        best_metric, best_value, best_step: the best evaluation by the metric that chooses the best checkpoint.
        best_is_lowest: less of that metric is better; of one of the user's own the recipe says it.
        tokens_per_s, examples_per_s: real tokens (no padding) and examples per second, all processes together.
        attempts: how many there were; `attempt` names the newest.
        seconds_left: of training, estimated from its speed.
        limit_s: seconds until the job's time limit.
        starts: when Slurm expects a waiting job to start, in seconds since the epoch.
        job_id: the newest Slurm job.
        nodes: where it runs.
        why: why it waits, failed or is unknown; remedy: what to do about it.
        metrics: of the model in `model/`, once there is one.
        warnings: what stands against its metrics: of the outcome, and of the data.
        error: what failed.
        made, ended: when the run was claimed, and when its outcome was written, in seconds since the epoch.
        recipe: the keys that are set: `train.learning_rate` -> value.
        sync: commands that upload its records to a tracker's server, or show them.
    """

    run: Path
    name: str
    state: State
    step: int = 0
    max_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    best_metric: str | None = None
    best_value: float | None = None
    best_step: int | None = None
    best_is_lowest: bool = False
    tokens_per_s: float | None = None
    examples_per_s: float | None = None
    attempts: int = 0
    attempt: str | None = None
    seconds_left: float | None = None
    limit_s: int | None = None
    starts: float | None = None
    job_id: str | None = None
    nodes: str = ""
    why: str | None = None
    remedy: str | None = None
    metrics: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None
    made: float = 0.0
    ended: float | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    sync: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self) | {
            "run": str(self.run),
            "metrics": self.metrics or {},
            "sync": list(self.sync),
            "warnings": list(self.warnings),
        }


def summarise(paths: Sequence[str | Path]) -> list[RunSummary]:
    """Summaries in the order of `paths`, with one call of squeue, and at most one of sacct, for all of them."""
    readings = read_runs(paths)
    open_jobs = {r.path: r.job_ids[-1] for r in readings if r.job_ids and not r.result.finished and not _has_ended(r)}
    unrecorded = [open_jobs[r.path] for r in readings if r.path in open_jobs and not _end_is_recorded(r)]
    jobs = query(list(dict.fromkeys(open_jobs.values())), account=unrecorded)
    now = time.time()
    return [_summary(reading, jobs.get(open_jobs.get(reading.path, "")), now) for reading in readings]


def read_runs(paths: Sequence[str | Path]) -> list[Reading]:
    """The readings of run directories; where one was deleted, its job is looked for in the queue."""
    folders = [Path(path).absolute() for path in paths]
    if len(folders) < 2:
        readings = [read_run(path) for path in folders]
    else:
        with ThreadPoolExecutor(_READERS) as pool:
            readings = list(pool.map(read_run, folders))
    deleted = [reading.path for reading in readings if not reading.path.exists()]
    jobs = jobs_below(deleted) if deleted else {}
    return [replace(reading, job_ids=jobs.get(reading.path, reading.job_ids)) for reading in readings]


def summary_of(path: str | Path) -> RunSummary:
    """As `summarise`, of one run."""
    return summarise([path])[0]


def _is_local(attempt: object) -> bool:
    return isinstance(attempt, str) and attempt.startswith("local-")


def _end_is_recorded(reading: Reading) -> bool:
    """True where the newest attempt recorded how it ended; a requeue may follow it."""
    outcome = reading.result.outcome
    return bool(outcome) and outcome.get("attempt") == (reading.attempt or outcome.get("attempt"))


def _has_ended(reading: Reading) -> bool:
    """True where the newest attempt recorded how it ended, and nothing follows it."""
    if not _end_is_recorded(reading) or reading.submitted > reading.result.recorded:
        return False
    return _is_local(reading.result.outcome.get("attempt")) or reading.next == "end"


def _summary(reading: Reading, job: Job | None, now: float) -> RunSummary:
    state, why, remedy = _state(reading, job)
    result, outcome, pace = reading.result, reading.result.outcome, reading.pace
    running = state == "RUNNING"
    speed = pace.get("tokens_per_s") if running else (outcome.get("utilisation") or {}).get("tokens_per_second")
    best = reading.best or (None, None, None)
    waits = job is not None and state == "PENDING" and job.start and now < job.start < now + _START_WITHIN_S
    nodes = (job.nodes if job else str(reading.lease.get("host") or "")) if running else ""
    return RunSummary(
        run=reading.path,
        name=result.name,
        state=state,
        step=reading.step,
        max_steps=reading.max_steps,
        epoch=reading.epoch,
        loss=reading.loss,
        best_metric=best[0],
        best_value=best[1],
        best_step=best[2],
        best_is_lowest=best[0] is not None and lower_is_better(best[0], result.metric_texts),
        tokens_per_s=speed,
        examples_per_s=pace.get("examples_per_s") if running else outcome.get("samples_per_second"),
        attempts=len(reading.attempts),
        attempt=reading.attempt,
        seconds_left=_seconds_left(reading, now) if running else None,
        limit_s=job.time_left_s if job and running else None,
        starts=job.start if job and waits else None,
        job_id=reading.job_ids[-1] if reading.job_ids else None,
        nodes=nodes,
        why=why,
        remedy=remedy,
        metrics=outcome.get("metrics") or {},
        warnings=result.warnings if best[0] is not None or outcome.get("metrics") else (),
        error=outcome.get("error") if state != "FINISHED" else None,
        made=result.made,
        ended=result.recorded if state in ("FINISHED", "STOPPED", "FAILED") and result.recorded else None,
        recipe=result.flat_recipe(),
        sync=tuple(sync_commands(reading.path, list(map(str, result.recipe.get("trackers") or ())))),
    )


def _state(reading: Reading, job: Job | None) -> tuple[State, str | None, str | None]:
    """The state, why, and what to do about it."""
    if reading.result.finished:
        early = reading.result.outcome.get("early_stop")
        why = f"stopped early at step {reading.step} of {reading.max_steps}: {early}" if early else None
        return "FINISHED", why, None
    if reading.liveness == "alive" or (reading.liveness == "fresh" and _is_local(reading.lease.get("attempt"))):
        where = f"starting in the background: process {reading.lease.get('pid')} on {reading.lease.get('host')}"
        return "RUNNING", where if reading.lease.get("via") == "local" else None, None
    if job is not None and job.state == "RUNNING":
        return "RUNNING", "its job has started" if not reading.attempts else None, None
    if job is not None and job.state == "PENDING":
        if not reading.path.exists():
            return "PENDING", "its run directory was deleted: the job will fail", f"scancel {job.job_id}"
        waiting = explain(job.slurm_state if job.reason in ("", "None") else job.reason, job.job_id)
        return "PENDING", str(waiting), waiting.remedy
    if job is not None and job.state == "UNKNOWN":
        if reading.liveness == "fresh":
            return "RUNNING", "Slurm does not answer; the run renewed its lease within the last minute", None
        return "UNKNOWN", f"Slurm does not answer: {job.reason}", "try again later; the run itself is not affected"
    return _state_when_gone(reading, job)


def _state_when_gone(reading: Reading, job: Job | None) -> tuple[State, str | None, str | None]:
    """The state of a run that is neither queued nor seen alive."""
    outcome, path, holder = reading.result.outcome, shlex.quote(str(reading.path)), reading.lease
    ended: State = "STOPPED" if outcome.get("outcome") == "stopped" else "FAILED"
    again, logs = f"afina {'submit' if job else 'resume'} {path}", f"see `afina logs {path}`"
    died = f"attempt {holder.get('attempt')} died without an outcome"
    if reading.liveness == "dead" and holder.get("via") == "local":  # after whatever was recorded
        return "FAILED", died, f"{logs}; then: {again}"
    if _end_is_recorded(reading):
        return ended, _first_line(outcome), again if ended == "STOPPED" else _remedy(outcome, again)
    if job is not None:
        if is_unseen(job, time.time() - reading.submitted, reading.attempts) and job.job_id not in reading.cancelled:
            return (
                "UNKNOWN",
                f"job {job.job_id} was just submitted, and squeue does not show it yet",
                "try again in a minute",
            )
        if job.slurm_state == "CANCELLED" or job.job_id in reading.cancelled:
            return "STOPPED", "its job was cancelled", again
        how = f" (Slurm: {job.slurm_state})" if job.slurm_state else ""
        what = f"attempt {reading.attempt}" if reading.attempt else f"job {job.job_id}"
        line, remedy = decisive_lines(reading.path, job.job_id)
        remedy = _BY_STATE.get(job.slurm_state) or remedy or logs
        return (
            "FAILED",
            f"{what} left the queue without an outcome{how}{line and ': ' + line}",
            f"{remedy}; then: {again}",
        )
    if reading.liveness == "dead":
        return "FAILED", died, again
    if reading.liveness == "silent":
        host, minutes = holder.get("host"), reading.silent_s / 60
        return (
            "UNKNOWN",
            f"its attempt on {host} has not renewed its lease for {minutes:.0f} min",
            f"check {host}; {again}",
        )
    if reading.attempts and not outcome:
        return "UNKNOWN", "its attempt is starting, or died before it began to train", logs
    if outcome:
        return ended, _first_line(outcome), again if ended == "STOPPED" else _remedy(outcome, again)
    if not reading.path.exists():
        return "FAILED", "its run directory was deleted", "start another run from the recipe"
    if (reading.path / "intent.json").exists():
        return "UNKNOWN", "sbatch gave no answer when it was submitted", f"afina submit {path} looks for its job first"
    return "PLANNED", None, f"afina submit {path}"


#: How Slurm ended a job that recorded nothing -> what to do first.
_BY_STATE = {
    "OUT_OF_MEMORY": "raise resources.mem_gb (sbatch --mem=… RUN/finetune.sbatch RUN keeps this run)",
    "TIMEOUT": "ask for more time: --time",
    "DEADLINE": "ask for more time: --time",
    "NODE_FAIL": "nothing: the node failed",
    "BOOT_FAIL": "nothing: the node failed",
}


def _remedy(outcome: Mapping[str, Any], again: str) -> str:
    failure = outcome.get("failure")
    own = str(failure.get("remedy") or "") if isinstance(failure, dict) else ""
    if own and outcome.get("cause") in ANOTHER_RUN:
        return own
    return f"{own}; then: {again}" if own else again


def _first_line(outcome: Mapping[str, Any]) -> str | None:
    if outcome.get("outcome") == "stopped":
        causes = {"asked": "a user asked for the stop", "signal": "by a signal", "limit": "at the time limit"}
        return causes.get(str(outcome.get("cause")))
    return (str(outcome.get("error") or "").splitlines() or [""])[0] or None


def _seconds_left(reading: Reading, now: float) -> float | None:
    """As the training reports; else from its first step and its last checkpoint."""
    if isinstance(left := reading.pace.get("seconds_left"), int | float):
        return max(0.0, left - (now - float(reading.pace.get("time") or now)))
    if reading.first_step is None or reading.checkpoint is None or not reading.max_steps:
        return None
    (began, first), (saved, step) = reading.first_step, reading.checkpoint
    if step <= first:
        return None
    return max(0.0, (saved - began) / (step - first) * (reading.max_steps - step) - (now - saved))
