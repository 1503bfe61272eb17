"""Runs worker processes from the host, and hears what they say: progress, a result, an error as the worker said it.

A worker answers on standard output, one JSON object a line; the last one is its result or its error. What it says to
people goes to standard error, past us. It runs in a session of its own: the terminal's Ctrl-C is for the host, which ends it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from afina import errors
from afina.errors import AfinaError, EnvironmentProblem

__all__ = ["call", "call_all"]

Hear = Callable[[int, dict[str, Any]], None]


def call(argv: Sequence[str], env: Mapping[str, str], data: str = "") -> dict[str, Any]:
    """Run one worker to its end, with `data` on its standard input; returns its result.

    Raises:
        AfinaError: as the worker said it.
    """
    return call_all([argv], [env], data)[0]


def call_all(
    argvs: Sequence[Sequence[str]],
    envs: Sequence[Mapping[str, str]],
    data: str = "",
    hear: Hear = lambda number, said: None,
) -> list[dict[str, Any]]:
    """Run workers beside each other to their ends; returns their results in order.

    Args:
        hear: called with the worker's number and each object that it says before its result; from several threads.

    Raises:
        AfinaError: as the first worker that failed said it; the others are ended.
    """
    workers: list[_Worker] = []
    try:
        for number, (argv, env) in enumerate(zip(argvs, envs, strict=True)):
            workers.append(_Worker(number, argv, env, data, hear))
        while any(worker.is_running() for worker in workers):
            if failed := [worker for worker in workers if worker.has_failed()]:
                failed[0].result()
            for worker in workers:
                worker.wait(0.2)
        return [worker.result() for worker in workers]
    finally:
        for worker in workers:
            worker.end()
        for worker in workers:
            worker.close()


class _Worker:
    """One process, and the thread that reads what it says."""

    def __init__(self, number: int, argv: Sequence[str], env: Mapping[str, str], data: str, hear: Hear) -> None:
        self.number, self.hear = number, hear
        self.last: dict[str, Any] = {}
        try:
            self.process = subprocess.Popen(
                list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(env), start_new_session=True
            )
        except OSError as error:
            raise EnvironmentProblem(
                f"{argv[0]}: {error.strerror}",
                "install Apptainer, or load its module in site.env (AFINA_RUNTIME=none runs without)",
            ) from None
        self.reading = threading.Thread(target=self._read, daemon=True)
        self.reading.start()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data.encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended, and says why

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if isinstance(said, dict):
                if self.last:
                    self.hear(self.number, self.last)
                self.last = said

    def is_running(self) -> bool:
        return self.process.poll() is None

    def has_failed(self) -> bool:
        return bool(self.process.poll())

    def wait(self, seconds: float) -> None:
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return

    def result(self) -> dict[str, Any]:
        self.reading.join(timeout=10)
        said, code = self.last, self.process.returncode
        if "error" in said:
            raise getattr(errors, str(said["error"]), AfinaError)(said["message"], said["remedy"])
        if code or not said:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            remedy = "see the lines above" + ("; out of memory? try --max-tokens 1024" if code in (-9, 137) else "")
            raise EnvironmentProblem(f"the worker {how} and said nothing", remedy)
        return said

    def end(self) -> None:
        if self.is_running():
            os.killpg(self.process.pid, signal.SIGTERM)

    def close(self) -> None:
        self.wait(30)
        if self.is_running():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.reading.join(timeout=10)
        if self.process.stdout is not None and not self.reading.is_alive():
            self.process.stdout.close()
