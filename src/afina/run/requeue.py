"""How an attempt ended, and what follows it: a requeue, or the end of the job. From the run directory alone; `job.sh` reads the decision.

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

import contextlib
import math
import re
import resource
import shlex
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from afina.errors import EXIT_ENVIRONMENT, EXIT_INPUT, AfinaError, EnvironmentProblem, Failure
from afina.files import write_atomic
from afina.run.allocation import Allocation
from afina.run.directory import RunDir
from afina.run.outcome import Outcome

__all__ = ["Next", "decide", "ensure_outcome", "finish_attempt"]

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


# -- an attempt that recorded nothing -----------------------------------------------------------------------------------


def ensure_outcome(run: RunDir, attempt: str, code: int) -> Outcome:
    """The outcome of an attempt that has ended; one that could not record its own is recorded as failed.

    Args:
        code: the exit code of the attempt's first node.
    """
    known = run.outcome()
    if known is not None and known.attempt == attempt:
        return known
    folder = run.attempts / attempt
    reported = run.reported_failures(attempt)
    if code == EXIT_ENVIRONMENT and not reported and (full := _full_disk(run.path)):
        return Outcome(outcome="failed", attempt=attempt, exit_code=code, failure=full)
    if reported and reported[0].cause == "claimed":  # the outcome belongs to the attempt that is running
        return Outcome(outcome="failed", attempt=attempt, exit_code=reported[0].exit_code, failure=reported[0])
    return run.record_failure(attempt, reported[0] if reported else _without_outcome(run, folder, code))


def _without_outcome(run: RunDir, folder: Path, code: int) -> Failure:
    """The failure of an attempt that recorded nothing: what its exit code, its nodes and its logs show."""
    number = -code if code < 0 else code - 128 if code > 128 else 0
    how = f"killed by signal {number}{_signal_name(number)}" if number else f"exit code {code}"
    remedy = f"see {folder}/node*.log; {run.how_to_resume()}"
    last = _last_lines(folder)
    lines = f"; its last lines:\n{last}" if last else ""
    if limit := _limit(number, last):
        return Failure("EnvironmentProblem", f"{limit}{lines}", _LIMIT_REMEDY, "ulimit")
    if _OUT_OF_MEMORY.search(last):
        gb = _memory_gb(run)
        more = f"raise resources.mem_gb to {math.ceil(gb * 1.5)} in the recipe" if gb else "set resources.mem_gb"
        script = shlex.join([str(run.path / "finetune.sbatch"), str(run.path)])
        again = f"; this run continues with: sbatch --mem={math.ceil((gb or 8) * 1.5)}G {script}"
        had = f" ({gb:g} GB per node)" if gb else ""
        return Failure(
            "EnvironmentProblem", f"the job's memory{had} is used up: {how}{lines}", more + again, "host-memory"
        )
    if absent := _absent_nodes(folder) or _first_to_fail(folder):
        message = f"{', '.join(absent)}: the worker never started there ({how}){lines}"
        return Failure("EnvironmentProblem", message, remedy, "node", tuple(absent))
    if met := _NOT_MET.search(last):
        message = f"the processes did not meet: {met[0]}{lines}"
        return Failure("TrainingError", message, f"{_NOT_MET_REMEDY}; {remedy}", "rendezvous")
    started = any(folder.glob("node*.json"))
    # Without a word from the worker, its code is srun's or the shell's: 2 is not the user's input.
    known = code if started or code != EXIT_INPUT else EXIT_ENVIRONMENT
    if started:
        return Failure.of_exit_code(known, f"the worker ended without an outcome ({how}){lines}", remedy, "killed")
    remedy = f"see {folder}/srun.log and node*.log; `afina doctor --job` starts the same step"
    return Failure.of_exit_code(known, f"the worker never started ({how}){lines}", remedy, "start")


#: Messages of the kernel, of slurmstepd and of srun about a job that used more memory than it has.
_OUT_OF_MEMORY = re.compile(
    r"oom[-_ ]?kill|(?<!CUDA )Out Of Memory|OUT_OF_ME|(exceeded|over) .{0,20}memory limit|memory cgroup", re.I
)
#: How torch ends a process that waited for the others at the start, on the first node and on another.
_NOT_MET = re.compile(
    r"Timed out after \d+ seconds waiting for clients\. [\d/]+ clients joined|client socket has timed out after .*"
)
_NOT_MET_REMEDY = (
    "check the network between the nodes with `afina doctor --job`; train.arguments.ddp_timeout sets the limit"
)
_LIMIT_REMEDY = "raise the limit (ulimit) in the site file, or ask your administrators; then submit the run again"


def _signal_name(number: int) -> str:
    try:
        return f" ({signal.Signals(number).name})"
    except ValueError:
        return ""


def _limit(number: int, last: str) -> str:
    """Which limit of the shell ended the worker; empty for none."""
    for signum, kind, what in (
        (signal.SIGXCPU, resource.RLIMIT_CPU, "processor time of {} s (ulimit -t)"),
        (signal.SIGXFSZ, resource.RLIMIT_FSIZE, "{} bytes in a file (ulimit -f)"),
    ):
        # The launcher of several processes reports the signal of the one that it killed.
        if number == signum or re.search(rf"\bSignal {int(signum)} |{signum.name}|exitcode *: *-{int(signum)}\b", last):
            limit = resource.getrlimit(kind)[0]
            shown = "a limit" if limit == resource.RLIM_INFINITY else f"{limit:,}"
            return f"the worker was ended by a limit of its node or shell: {what.format(shown)}"
    return ""


def _memory_gb(run: RunDir) -> float | None:
    """GB per node that the job has; None if that is not known."""
    if (given := Allocation.from_env().memory_gb) is not None:
        return given
    with contextlib.suppress(AfinaError):
        return run.plan().recipe.resources.mem_gb
    return None


def _full_disk(folder: Path) -> Failure | None:
    """The failure of a disk on which not even the outcome can be recorded."""
    try:
        write_atomic(folder / ".room", bytes(4096))
    except EnvironmentProblem as error:
        return replace(error.failure, cause="disk")
    (folder / ".room").unlink()
    return None


def _absent_nodes(folder: Path) -> list[str]:
    """Nodes of the allocation on which no worker began, if it did on others."""
    names = Allocation.from_env().node_names
    absent = [name for number, name in enumerate(names) if not (folder / f"node{number}.json").exists()]
    return absent if len(absent) < len(names) else []


#: What srun prints about a node that did not start a task, and about tasks that ended; it then ends all the others.
_NODE_FAILED = re.compile(r"(?:Node failure on|failed on node) ([\w.-]+)")
_TASK_EXITED = re.compile(r"^srun: error: ([\w.-]+): tasks? \S+: Exited", re.M)


def _first_to_fail(folder: Path) -> list[str]:
    """The nodes that kept the worker from starting anywhere, by srun's words; empty where it names none, or all."""
    try:
        text = (folder / "srun.log").read_text(errors="replace")
    except OSError:
        return []
    names = _NODE_FAILED.findall(text) or _TASK_EXITED.findall(text)[:1]
    return list(dict.fromkeys(names)) if not set(Allocation.from_env().node_names) <= set(names) else []


def _last_lines(folder: Path, count: int = 15) -> str:
    logs = [*sorted(folder.glob("node*.log")), *folder.glob("srun.log")]
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()[-count:]]
    return "\n".join(f"  | {line}" for line in lines[-count:])
