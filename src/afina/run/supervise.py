"""The host's side of one attempt on one node: start the worker, keep its log, turn signals into a request to stop.

Used by `afina train`; `slurm/job.sh` does the same in bash. A signal makes the run's stop file:
the ranks then agree on a step, commit a checkpoint and leave. An attempt that could not record its outcome gets one here.
`python -m afina.run.supervise RUN ATTEMPT` is the same in the background: it outlives the process that submitted it.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Literal

from afina.errors import EXIT_FAILED, AfinaError
from afina.files import read_json
from afina.processes import boot_id, spawn_detached, start_time
from afina.run.causes import ensure_outcome
from afina.run.commands import worker_argv
from afina.run.directory import RunDir
from afina.run.workers import cannot_start
from afina.site.settings import in_container
from afina.text import CLEAR_LINE, can_draw

__all__ = [
    "LeaseMonitor",
    "Liveness",
    "SignalForwarder",
    "background_argv",
    "lease_of",
    "run_node",
    "start_in_background",
]

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
    argv = _worker_argv(run)
    # From before this attempt: of an earlier one, or of this name (a requeue under the same number).
    (folder / "exit").unlink(missing_ok=True)
    if lease_of(run.path)[1] not in ("alive", "fresh"):  # else the stop is for the attempt that lives
        run.stop_file.unlink(missing_ok=True)
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    # The signals are caught before the worker exists: one between the two would end this process alone, and the worker go on.
    with (folder / "node0.log").open("ab", buffering=0) as log, SignalForwarder(run, received) as forwarder:
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
        forwarder.worker = worker
        assert worker.stdout is not None
        copy = threading.Thread(target=_tee, args=(worker.stdout, log), daemon=True)
        copy.start()
        code = _wait(worker, copy, LeaseMonitor(run, attempt))
        copy.join(timeout=10)
    if not copy.is_alive():  # else a process that the worker left behind still holds the pipe
        worker.stdout.close()
    return _recorded_code(folder, code)


def _worker_argv(run: RunDir) -> list[str]:
    """The command of the worker; inside a container (the image, or one with the same packages) without that which starts one."""
    argv = run.worker_argv()
    return worker_argv(run.plan(), *argv[-2:]) if in_container() else argv


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

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

    _PATIENCE_S = 10.0

    def __init__(self, run: RunDir, received: list[int] | None = None) -> None:
        self.run = run
        #: A second signal ends it; None before it starts.
        self.worker: subprocess.Popen[bytes] | None = None
        self.received = received if received is not None else []
        self._first = 0.0

    def __enter__(self) -> SignalForwarder:
        # Outside the main thread (a notebook's, a test's) signals belong to the surrounding program.
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._forward) for number in self.SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)  # blocked until now in the background
        return self

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
        if (again or late) and self.worker is not None:
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
        if beside_bar:  # whole lines, each in place of the bar, which the worker draws again below
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
    """The lease of a run, whether its holder lives, and seconds since its renewal; an empty one where no attempt holds it.

    A run in the background that holds none (it is starting, or ending) has the record of its supervisor in its place.
    """
    lease = read_json(run / "lease.json")
    last: dict[str, Any] = next(reversed([*RunDir(run).lines("submissions.jsonl")]), {})
    renewed = _written(run / "lease.json") if lease else 0.0
    held = (lease, *_liveness(lease, renewed)) if lease else ({}, None, 0.0)
    if last.get("via") != "local" or held[1] in ("alive", "fresh"):
        return held
    background = (last, *_liveness(last, float(last["time"])))
    over = float(last["time"]) < max(renewed, _written(run / "outcome.json"))
    return held if over and background[1] != "alive" else background


def _written(path: Path) -> float:
    """When a file was written, in seconds since the epoch; 0 where it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _liveness(holder: Mapping[str, Any], since: float) -> tuple[Liveness, float]:
    """True if a process lives that wrote down its `pid`, when it `started`, its `host` and that one's `boot`; seconds since then."""
    silent_s = max(0.0, time.time() - since)
    if holder.get("boot") == boot_id():
        # The process id alone is not enough: it may be another process's by now.
        pid = holder.get("pid")
        return "alive" if isinstance(pid, int) and holder.get("started") == start_time(pid) else "dead", silent_s
    if holder.get("host") == platform.node():
        return "dead", silent_s  # the machine has rebooted since
    return "fresh" if silent_s < _FRESH_S else "silent", silent_s


# -- in the background -------------------------------------------------------------------------------------------------


def background_argv(run: Path, attempt: str) -> list[str]:
    """The command of an attempt in the background."""
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    return [sys.executable, *safe, "-m", "afina.run.supervise", str(run), attempt]


def start_in_background(run: RunDir, env: Mapping[str, str]) -> str:
    """Start the next attempt in a session of its own, which goes on when this process ends; returns the attempt's name.

    Its output goes to the attempt's log alone. It is recorded in `submissions.jsonl`, with its process.

    Args:
        env: added to this process's environment.

    Raises:
        EnvironmentProblem: it cannot be started.
    """
    attempt = run.begin_attempt().name
    run.stop_file.unlink(missing_ok=True)
    log = run.attempts / attempt / "node0.log"
    argv = background_argv(run.path, attempt)
    try:
        # Signals wait until the forwarder is there.
        pid = spawn_detached(argv, {**os.environ, **env}, log, blocked=SignalForwarder.SIGNALS)
    except OSError as error:
        raise cannot_start(argv[0], error) from None
    who = {"pid": pid, "started": start_time(pid), "host": platform.node(), "boot": boot_id()}
    run.append("submissions.jsonl", {"via": "local", "attempt": attempt, **who})
    return attempt


def _main(path: str, attempt: str) -> int:
    run = RunDir(path)
    try:
        return ensure_outcome(run, attempt, run_node(run, attempt, env={})).exit_code
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return run.record_failure(attempt, error.failure).exit_code


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
