"""Why an attempt ended that could not record it: its exit code, its nodes and its logs show it."""

from __future__ import annotations

import contextlib
import math
import re
import resource
import shlex
import signal
from dataclasses import replace
from pathlib import Path

from afina.errors import EXIT_ENVIRONMENT, EXIT_INPUT, AfinaError, EnvironmentProblem, Failure
from afina.files import write_atomic
from afina.run.allocation import Allocation
from afina.run.directory import RunDir
from afina.run.outcome import Outcome

__all__ = ["ensure_outcome"]


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
