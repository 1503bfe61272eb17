"""Decide what follows an attempt: a requeue, or the end of the job. From the run directory alone; `job.sh` reads the decision.

    finished, or a user asked for the stop         the end
    stopped at the time limit                      again, if a step was made since the attempt before
    stopped by a signal (preemption)               again, always
    failed on a node that is broken                again, without that node
    failed: loss not finite, disk full, bad input  the end: it would fail again
    failed otherwise                               again; the same failure twice without a step in between: the end

`attempts/<id>/next` has three lines for bash: `requeue` or `end`; nodes to leave out; the reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from afina.errors import EXIT_ENVIRONMENT, EXIT_INPUT
from afina.files import write_atomic
from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.run.supervise import ensure_outcome

__all__ = ["Next", "decide", "finish_attempt"]

#: Failures that another attempt would meet again.
_LASTING = ("loss", "disk", "claimed")


@dataclass(frozen=True)
class Next:
    """The decision, its reason for the log, and nodes that the next attempt must not get."""

    action: Literal["requeue", "end"]
    why: str
    exclude: tuple[str, ...] = ()


def finish_attempt(run: RunDir, attempt: str, code: int) -> Outcome:
    """Record how an attempt of a Slurm job ended, decide what comes next, and write it to `attempts/<id>/next`."""
    outcome = ensure_outcome(run, attempt, code)
    step, committed = _progress(run, attempt)
    following = decide(run, outcome)
    run.event(
        "attempt_ended",
        attempt=attempt,
        outcome=outcome.outcome,
        cause=outcome.cause,
        failure=_signature(outcome),
        began=step,
        committed=committed,
        next=following.action,
        why=following.why,
    )
    lines = (following.action, ",".join(following.exclude), following.why)
    write_atomic(run.attempts / attempt / "next", "\n".join(lines) + "\n")
    return outcome


def decide(run: RunDir, outcome: Outcome) -> Next:
    """The decision after an attempt that ended with `outcome`."""
    began, committed = _progress(run, outcome.attempt)
    moved = began is not None and committed > began
    cause = outcome.cause or ""
    if outcome.outcome == "finished":
        return Next("end", "the run has finished")
    if outcome.outcome == "stopped":
        if cause == "asked":
            return Next("end", "a user asked for this stop: the job is not requeued")
        if cause == "limit" and not moved:
            return Next("end", "no step was made within the time limit: ask for more time (resources.time, --time)")
        return Next("requeue", f"stopped ({cause or 'signal'}) with a checkpoint at step {committed}: to be resumed")
    if cause == "node":
        bad = outcome.failure.nodes if outcome.failure else ()
        return Next("requeue", f"{', '.join(bad)} cannot run this job: requeued without it", bad)
    if cause in _LASTING or outcome.exit_code in (EXIT_INPUT, EXIT_ENVIRONMENT):
        return Next("end", "this would fail again: see the error and its remedy above")
    if moved:
        return Next("requeue", f"failed after progress (checkpoint at step {committed}): requeued to resume there")
    failures = [e for e in run.lines("events.jsonl") if e.get("event") == "attempt_ended" and e.get("failure")]
    if failures and failures[-1]["failure"] == _signature(outcome) and failures[-1]["committed"] == committed:
        return Next(
            "end", f"the same failure twice without a step in between ({_signature(outcome)}): the job ends here"
        )
    return Next("requeue", "failed for the first time at this point: requeued to resume from the newest checkpoint")


def _progress(run: RunDir, attempt: str) -> tuple[int | None, int]:
    """The step an attempt began at (None: it never began to train), and the newest committed step now."""
    began = [
        e["step"] for e in run.lines("events.jsonl") if e.get("event") == "training" and e.get("attempt") == attempt
    ]
    steps = [
        int(path.name.partition("-")[2])
        for path in run.checkpoints.glob("step-*")
        if path.name.partition("-")[2].isdigit() and (path / "manifest.json").is_file()
    ]
    return (began[0] if began else None), max(steps, default=0)


def _signature(outcome: Outcome) -> str | None:
    """Equal for failures that count as the same: the cause and the first line without its numbers."""
    if outcome.outcome != "failed":
        return None
    first = outcome.failure.message.partition("\n")[0] if outcome.failure else ""
    return f"{outcome.cause}: {re.sub(r'[0-9]+', '#', first)[:200]}"
