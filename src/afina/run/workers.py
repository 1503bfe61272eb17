"""The host's side of the door: start `python -m afina.worker COMMAND`, send it a question, read its answer.

The question is JSON on standard input, the answer lines of JSON on standard output, as `afina.worker.reply` writes them. What a worker
tells people goes to standard error, past us. It runs in a session of its own: the terminal's Ctrl-C reaches the host, which
ends the worker and everything that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from afina.errors import AfinaError, EnvironmentProblem, Failure

__all__ = ["ask_worker", "ask_workers", "cannot_start", "follow_worker"]

_END_S = 30.0


def ask_worker(
    argv: Sequence[str],
    env: Mapping[str, str] | None,
    question: Any = None,
    *,
    name: str,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run a worker to its end and return its answer.

    Args:
        argv: the command, `--json` left out.
        env: None: that of this process.
        question: sent as JSON; None sends nothing.
        name: what the worker is called in messages: "the prepare stage".
        check: called while it runs; what it raises ends the worker.

    Raises:
        AfinaError: as the worker reported it.
        EnvironmentProblem: it cannot be started, or ends without an answer.
    """
    return ask_workers([argv], [env], question, name=name, check=check)[0]


def ask_workers(
    argvs: Sequence[Sequence[str]],
    envs: Sequence[Mapping[str, str] | None],
    question: Any = None,
    *,
    name: str,
    on_progress: Callable[[int, dict[str, Any]], None] = lambda number, progress: None,
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Run workers beside each other to their ends; returns their answers in order.

    Args:
        on_progress: called with a worker's number and what it reports; from several threads.

    Raises:
        AfinaError: as the first worker that failed reported it; the others are ended.
    """
    workers: list[_Worker] = []
    readers: list[threading.Thread] = []

    def read(number: int, worker: _Worker) -> None:
        for progress in worker.progress():
            on_progress(number, progress)

    try:
        for number, (argv, env) in enumerate(zip(argvs, envs, strict=True)):
            workers.append(_Worker(argv, env, question, name))
            readers.append(threading.Thread(target=read, args=(number, workers[-1]), daemon=True))
            readers[-1].start()
        while any(worker.is_running() for worker in workers) and not any(worker.has_failed() for worker in workers):
            check()
            for worker in workers:
                worker.wait(0.2)
        for worker, reader in zip(workers, readers, strict=True):
            if not worker.is_running():
                reader.join(timeout=10)
        for worker in sorted(workers, key=lambda worker: not worker.has_failed()):
            worker.answer()
        return [worker.answer() for worker in workers]
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.close()
        for reader in readers:
            reader.join(timeout=10)


def follow_worker(
    argv: Sequence[str], env: Mapping[str, str], question: Any = None, *, name: str
) -> Iterator[dict[str, Any]]:
    """Run a worker and yield what it reports, as it comes. It is ended where the caller stops early.

    Raises:
        AfinaError, EnvironmentProblem: as `ask_worker`.
    """
    worker = _Worker(argv, env, question, name)
    try:
        yield from worker.progress()
        worker.wait(_END_S)
        worker.answer()
    finally:
        worker.terminate()
        worker.close()


def cannot_start(program: str, error: OSError) -> EnvironmentProblem:
    """The error for a worker's command that does not start."""
    return EnvironmentProblem(
        f"{program}: {error.strerror}",
        "install Apptainer, or load its module in site.env (AFINA_RUNTIME=none runs without)",
    )


class _Worker:
    """One process, and the last line of its output."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None, question: Any, name: str) -> None:
        self.name = name
        self.last: dict[str, Any] = {}
        try:
            self.process = subprocess.Popen(
                [*argv, "--json"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True
            )
        except OSError as error:
            raise cannot_start(argv[0], error) from None
        assert self.process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and reports why
                self.process.stdin.write(b"" if question is None else json.dumps(question).encode())
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        except BaseException:
            self.terminate()
            self.close()
            raise

    def progress(self) -> Iterator[dict[str, Any]]:
        """The progress that it reports, to the end of its output; lines that are not of the protocol are ignored."""
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                if isinstance(value, dict) and value.keys() == {"progress"}:
                    yield value["progress"]
                elif isinstance(value, dict):
                    self.last = value

    def answer(self) -> dict[str, Any]:
        """The answer of a worker that has ended."""
        if "failure" in self.last:
            error = Failure.from_dict(self.last["failure"]).error()
            raise (
                error.about(self.name) if type(error) is AfinaError else error
            )  # a defect says nothing of what was done
        code = self.process.returncode
        if code or not self.last:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            memory = "; was it out of memory? use smaller batches" if code in (-signal.SIGKILL, 137) else ""
            raise EnvironmentProblem(f"{self.name} {how} without an answer", f"see the lines above{memory}")
        return self.last

    def is_running(self) -> bool:
        return self.process.poll() is None

    def has_failed(self) -> bool:
        return bool(self.process.poll())

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=seconds)

    def terminate(self) -> None:
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)

    def close(self) -> None:
        self.wait(_END_S)
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
