"""The decision after an attempt: a requeue, or the end of the job. From the run directory alone; `job.sh` reads the decision.

    finished, or a user asked for the stop         the end
    stopped at the time limit                      again, if a step was made since the attempt before
    stopped by a signal (preemption)               again, always
    failed on nodes that are broken                again, without them and all before them, after a growing pause;
                                                   the same way on four nodes, or six times in a row: the end
    failed: loss not finite, disk full, a limit,   the end: it would fail again
      out of host memory, bad input
    failed otherwise                               again; the same failure twice without a step in between: the end

`attempts/<id>/next` has four lines for bash: `requeue` or `end`; nodes to leave out; the reason; seconds to wait. Where the
container does not start, `slurm/job.sh` decides by itself (`afina_decide`) and writes the same files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from afina.files import write_atomic
from afina.run.causes import ensure_outcome
from afina.run.directory import RunDir
from afina.run.outcome import Outcome

__all__ = ["Next", "decide", "finish_attempt"]

#: Attempts in a row that failed on their nodes, and distinct nodes that failed in the same way: then it is not the nodes.
_MOST_NODE_FAILURES, _SAME_WAY = 6, 4
#: Seconds before the next attempt, by how many in a row failed on their nodes.
_PAUSES_S = (0, 60, 300, 900, 1800)


@dataclass(frozen=True)
class Next:
    """The decision, its reason for the log, nodes that the next attempt must not get, and seconds to wait before it."""

    action: Literal["requeue", "end"]
    why: str
    exclude: tuple[str, ...] = ()
    pause_s: int = 0


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
        excluded=",".join(following.exclude),
    )
    lines = (following.action, ",".join(following.exclude), following.why.replace("\n", " "), str(following.pause_s))
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
        return _after_bad_nodes(run, outcome)
    if outcome.fails_again:
        return Next("end", "this would fail again: see the error and its remedy above")
    if moved:
        return Next("requeue", f"failed after progress (checkpoint at step {committed}): requeued to resume there")
    failures = [e for e in run.lines("events.jsonl") if e.get("event") == "attempt_ended" and e.get("failure")]
    if failures and failures[-1]["failure"] == _signature(outcome) and failures[-1]["committed"] == committed:
        return Next(
            "end", f"the same failure twice without a step in between ({_signature(outcome)}): the job ends here"
        )
    return Next("requeue", "failed for the first time at this point: requeued to resume from the newest checkpoint")


def _after_bad_nodes(run: RunDir, outcome: Outcome) -> Next:
    """Again without every node that failed so far, unless that has failed too often."""
    bad = outcome.failure.nodes if outcome.failure else ()
    ended = [e for e in run.lines("events.jsonl") if e.get("event") == "attempt_ended"]
    excluded = next((str(e["excluded"]).split(",") for e in reversed(ended) if e.get("excluded")), [])
    row = []
    for event in reversed(ended):
        if event.get("cause") != "node":
            break
        row.append(event)
    every = tuple(dict.fromkeys(sorted({*excluded, *bad})))
    same = sum(event.get("failure") == _signature(outcome) for event in row)
    if len(row) + 1 >= _MOST_NODE_FAILURES or same + 1 >= _SAME_WAY:
        return Next(
            "end",
            f"{len(row) + 1} attempts in a row failed on their nodes ({', '.join(every)}): it is not the nodes",
            every,
        )
    why = f"{', '.join(bad)} cannot run this job: submitted again without {', '.join(every)}"
    return Next("requeue", why, every, _PAUSES_S[min(len(row), len(_PAUSES_S) - 1)])


def _progress(run: RunDir, attempt: str) -> tuple[int | None, int]:
    """The step an attempt began at (None: it never began to train), and the newest committed step now."""
    began = [
        e["step"] for e in run.lines("events.jsonl") if e.get("event") == "training" and e.get("attempt") == attempt
    ]
    return (began[0] if began else None), run.newest_step


def _signature(outcome: Outcome) -> str | None:
    """Equal for failures that count as the same: the cause and the first line without its numbers."""
    if outcome.outcome != "failed":
        return None
    first = outcome.failure.message.partition("\n")[0] if outcome.failure else ""
    for node in outcome.failure.nodes if outcome.failure else ():
        first = first.replace(node, "NODE")
    return f"{outcome.cause}: {re.sub(r'[0-9]+', '#', first)[:200]}"
