"""The host's side of one attempt on one node: start the worker, keep its log, hear signals, ask for a stop.

Used by `afina train` and by submitit's task; `slurm/finetune.sbatch` does the same in bash. A signal is answered by
touching the run's stop file: the ranks then agree on a step, commit a checkpoint and leave.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from afina.errors import EXIT_FAILED, EnvironmentProblem
from afina.rundir import Outcome, RunDir

__all__ = ["run_node", "settle"]


def run_node(run: RunDir, attempt: str, *, env: Mapping[str, str], node: int = 0, show: bool = True) -> int:
    """Run the worker of one node to its end; returns its exit code as the worker wrote it.

    Args:
        attempt: its folder is made if need be; the log goes to `node<k>.log` in it.
        env: added to the environment of the worker.
        show: also pass the worker's output on to standard output.

    The first SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 asks for a stop, a second SIGINT terminates the worker.
    """
    folder = run.begin_attempt(attempt)
    argv = run.worker_argv()
    # Written by the attempt before it, if this one takes the name again (a requeue under the same number).
    (folder / "exit").unlink(missing_ok=True)
    try:
        worker = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if not (show and sys.stderr.isatty()) else None,
            env={**os.environ, **env, "AFINA_ATTEMPT": attempt},
            start_new_session=True,  # the terminal's Ctrl-C is for the supervisor: the ranks stop together, at a step
        )
    except OSError as error:
        raise EnvironmentProblem(
            f"{argv[0]}: {error.strerror}",
            "install Apptainer, or load its module in site.env (AFINA_RUNTIME=none runs without)",
        ) from None
    hear = _Ear(run, worker)
    assert worker.stdout is not None
    with (folder / f"node{node}.log").open("ab") as log, hear:
        copy = threading.Thread(target=_tee, args=(worker.stdout, log, show), daemon=True)
        copy.start()
        code = _wait(worker, copy)
        copy.join(timeout=10)
    if not copy.is_alive():  # else a process that the worker left behind still holds the pipe
        worker.stdout.close()
    return _recorded_code(folder, code)


def settle(run: RunDir, attempt: str, code: int) -> Outcome:
    """The outcome of an attempt that has ended; one that could not record its own is recorded as failed here."""
    known = run.outcome()
    if known is not None and known.attempt == attempt:
        return known
    folder = run.attempts / attempt
    for failure in sorted(folder.glob("failed.rank*.json")):
        try:
            said = json.loads(failure.read_text())
        except ValueError:  # cut off: the disk was full, or the rank was killed while it wrote
            continue
        return run.record_failure(attempt, said["error"], exit_code=said["exit_code"])
    cause = f"killed by signal {-code if code < 0 else code - 128}" if code < 0 or code > 128 else f"exit code {code}"
    last = _last_lines(folder)
    return run.record_failure(
        attempt,
        f"the worker ended without an outcome ({cause})"
        + (f"; its last lines:\n{last}" if last else "")
        + f"\n  remedy: see {folder}/node*.log; `afina resume` continues from the newest checkpoint",
        exit_code=code if code in (2, 3) else EXIT_FAILED,
    )


def _wait(worker: subprocess.Popen[bytes], copy: threading.Thread) -> int:
    """The worker's exit code. Never blocks for long: a signal that comes just before `waitpid` blocks is not heard until
    that returns (seen: 10 seconds later, when the worker ended)."""
    while True:
        copy.join(timeout=0.5)
        try:
            return worker.wait(timeout=0 if copy.is_alive() else 0.5)
        except subprocess.TimeoutExpired:
            continue


class _Ear:
    """Signal handlers that touch the stop file, and nothing else: Slurm delivers a signal two or three times."""

    _HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

    def __init__(self, run: RunDir, worker: subprocess.Popen[bytes]) -> None:
        self.run, self.worker, self.interrupts = run, worker, 0

    def __enter__(self) -> None:
        # Outside the main thread (a notebook's, a test's) signals belong to the surrounding program.
        self.before = (
            {number: signal.signal(number, self._hear) for number in self._HEARD}
            if threading.current_thread() is threading.main_thread()
            else {}
        )

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        Path(self.run.stop_file).touch()
        if number == signal.SIGINT:
            self.interrupts += 1
            if self.interrupts == 1:
                os.write(2, b"\nafina: stopping at the next step, with a checkpoint; Ctrl-C again to leave at once\n")
            else:
                os.killpg(self.worker.pid, signal.SIGKILL)


def _tee(source: BinaryIO, log: BinaryIO, show: bool) -> None:
    while block := source.read1(65536) if hasattr(source, "read1") else source.read(65536):
        log.write(block)
        log.flush()
        if show:
            sys.stdout.write(block.decode(errors="replace"))
            sys.stdout.flush()


def _recorded_code(folder: Path, code: int) -> int:
    """What the worker wrote; accelerate says 1 whatever its workers said."""
    try:
        return int((folder / "exit").read_text())
    except (OSError, ValueError):
        return code if code != 0 else EXIT_FAILED


def _last_lines(folder: Path, count: int = 15) -> str:
    logs = sorted(folder.glob("node*.log"))
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()[-count:]]
    return "\n".join(f"  | {line}" for line in lines[-count:])
