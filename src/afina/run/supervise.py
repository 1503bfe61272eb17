"""The host's side of one attempt on one node: start the worker, keep its log, turn signals into a request to stop.

Used by `afina train`; `slurm/job.sh` does the same in bash. A signal makes the run's stop file:
the ranks then agree on a step, commit a checkpoint and leave. An attempt that could not record its outcome gets one here.
"""

from __future__ import annotations

import codecs
import contextlib
import math
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Literal

from afina.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_INPUT, AfinaError, EnvironmentProblem, Failure
from afina.files import read_json, write_atomic
from afina.processes import boot_id, start_time
from afina.run.allocation import Allocation
from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.run.workers import cannot_start
from afina.text import CLEAR_LINE, can_draw

__all__ = ["LeaseMonitor", "Liveness", "SignalForwarder", "ensure_outcome", "lease_of", "run_node"]

#: alive: its process runs on this machine; dead: it did; fresh: renewed within the last minute elsewhere; silent: not renewed.
Liveness = Literal["alive", "fresh", "dead", "silent"]
#: A lease is renewed every ten seconds; a shared file system may show it a little later.
_FRESH_S = 60.0


def run_node(run: RunDir, attempt: str, *, env: Mapping[str, str], received: list[int] | None = None) -> int:
    """Run the worker of this machine to its end; returns its exit code as the worker wrote it.

    Its output goes to `node0.log` of the attempt, and on to standard output as long as somebody reads that.

    Args:
        attempt: its folder is made if need be.
        env: added to the environment of the worker.
        received: gets the signals that arrived meanwhile.

    The first SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 asks for a stop; a second SIGINT, or a SIGTERM ten seconds after the first signal,
    ends the worker at once.
    """
    folder = run.begin_attempt(attempt)
    argv = run.worker_argv()
    # From before this attempt: of an earlier one, or of this name (a requeue under the same number).
    (folder / "exit").unlink(missing_ok=True)
    if lease_of(run.path)[1] not in ("alive", "fresh"):  # else the stop is for the attempt that lives
        run.stop_file.unlink(missing_ok=True)
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    try:
        worker = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if on_terminal else subprocess.STDOUT,
            env={**os.environ, **env, "AFINA_ATTEMPT": attempt},
            start_new_session=True,  # the terminal's Ctrl-C is for the supervisor: the ranks stop together, at a step
        )
    except OSError as error:
        raise cannot_start(argv[0], error) from None
    assert worker.stdout is not None
    with (folder / "node0.log").open("ab", buffering=0) as log, SignalForwarder(run, worker, received):
        copy = threading.Thread(target=_tee, args=(worker.stdout, log), daemon=True)
        copy.start()
        code = _wait(worker, copy, LeaseMonitor(run, attempt))
        copy.join(timeout=10)
    if not copy.is_alive():  # else a process that the worker left behind still holds the pipe
        worker.stdout.close()
    return _recorded_code(folder, code)


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


def _wait(worker: subprocess.Popen[bytes], copy: threading.Thread, monitor: LeaseMonitor | None) -> int:
    """The worker's exit code. Never blocks for long: a signal that comes just before `waitpid` blocks is not handled until
    that returns (seen: 10 seconds later, when the worker ended)."""
    while True:
        copy.join(timeout=0.5)
        try:
            return worker.wait(timeout=0 if copy.is_alive() else 0.5)
        except subprocess.TimeoutExpired:
            if monitor is not None and (silent := monitor.silent_s()):
                print(
                    f"afina: the worker has given no sign of life for {silent:.0f} s: killed",
                    file=sys.stderr,
                    flush=True,
                )
                os.killpg(worker.pid, signal.SIGKILL)
                monitor = None


class LeaseMonitor:
    """Watches the lease of an attempt's worker: one that was suspended (SIGSTOP) cannot notice it itself."""

    #: More than the renewals of a slow file system.
    _BEYOND_S = 45.0

    def __init__(self, run: RunDir, attempt: str) -> None:
        self.path, self.attempt = run.path / "lease.json", attempt
        self._last: dict[str, object] = {}
        self._since = self._checked = time.monotonic()

    def silent_s(self) -> float | None:
        """Seconds since the last renewal, if they are more than the lease allows."""
        now, before = time.monotonic(), self._checked
        if now - before < 5.0:
            return None
        self._checked = now
        lease = read_json(self.path)
        # A pause of this process itself (`scontrol suspend`) is not the worker's.
        if lease != self._last or lease.get("attempt") != self.attempt or now - before > 60.0:
            self._last, self._since = lease, now
        silent = now - self._since
        return silent if silent > float(lease.get("patience_s", 1e9)) + self._BEYOND_S else None


class SignalForwarder:
    """Signal handlers that write the stop file, and nothing else: Slurm delivers a signal two or three times."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

    _PATIENCE_S = 10.0

    def __init__(self, run: RunDir, worker: subprocess.Popen[bytes], received: list[int] | None = None) -> None:
        self.run, self.worker = run, worker
        self.received = received if received is not None else []
        self._first = 0.0

    def __enter__(self) -> None:
        # Outside the main thread (a notebook's, a test's) signals belong to the surrounding program.
        self.before = (
            {number: signal.signal(number, self._forward) for number in self._SIGNALS}
            if threading.current_thread() is threading.main_thread()
            else {}
        )

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):  # it exists; or the disk is full, and the ranks get the signal themselves
            descriptor = os.open(self.run.stop_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(descriptor, b"asked\n" if number == signal.SIGINT else b"signal\n")
            os.close(descriptor)
        now = time.monotonic()
        again = number == signal.SIGINT and signal.SIGINT in self.received
        # bool: the empty list itself would become true below.
        late = number == signal.SIGTERM and bool(self.received) and now - self._first > self._PATIENCE_S
        self._first = self._first if self.received else now
        self.received.append(number)
        if again or late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.worker.pid, signal.SIGKILL)
        elif number == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.write(2, b"\nafina: stopping at the next step, with a checkpoint; Ctrl-C again to leave at once\n")


def _tee(source: BinaryIO, log: BinaryIO) -> None:
    """Copy until the end, the log first. The log may be lost to a full disk and standard output to a reader that went away:
    the worker must not block on a pipe that nobody reads."""
    shown, decoder = True, codecs.getincrementaldecoder("utf-8")("replace")
    beside_bar, rest = can_draw(sys.stdout) and can_draw(sys.stderr), ""
    while block := source.read1(65536) if hasattr(source, "read1") else source.read(65536):
        with contextlib.suppress(OSError):
            log.write(block)
        text = rest + decoder.decode(block)
        if (
            beside_bar
        ):  # the worker draws on standard error: whole lines, each in place of the bar, which is drawn again below
            text, newline, rest = text.rpartition("\n")
            text = "".join(f"{CLEAR_LINE}{line}\n" for line in text.split("\n")) if newline else ""
        shown = shown and _show(text)
    if rest:
        _show(CLEAR_LINE + rest)


def _show(text: str) -> bool:
    """Write to standard output, in its own encoding; False if that is gone."""
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # no reader, closed, None (pythonw, a daemon)
        return False
    return True


def _recorded_code(folder: Path, code: int) -> int:
    """The code that the worker wrote; accelerate ends with 1 whatever its workers end with."""
    try:
        return int((folder / "exit").read_text())
    except (OSError, ValueError):
        return code if code != 0 else EXIT_FAILED


def lease_of(run: Path) -> tuple[dict[str, Any], Liveness | None, float]:
    """The lease of a run, whether its holder lives, and seconds since its renewal; an empty one where no attempt holds it."""
    path = run / "lease.json"
    lease = read_json(path)
    if not lease:
        return {}, None, 0.0
    silent_s = max(0.0, time.time() - path.stat().st_mtime) if path.exists() else 0.0
    if lease.get("boot") == boot_id():
        # The process id alone is not enough: it may be another process's by now.
        pid = lease.get("pid")
        alive = isinstance(pid, int) and lease.get("started") == start_time(pid)
        return lease, "alive" if alive else "dead", silent_s
    if lease.get("host") == platform.node():
        return lease, "dead", silent_s  # the machine has rebooted since
    return lease, "fresh" if silent_s < _FRESH_S else "silent", silent_s


def _last_lines(folder: Path, count: int = 15) -> str:
    logs = [*sorted(folder.glob("node*.log")), *folder.glob("srun.log")]
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()[-count:]]
    return "\n".join(f"  | {line}" for line in lines[-count:])
