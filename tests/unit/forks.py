"""The worker's processes as forks of one that has imported PyTorch and Transformers, which costs more than what most tests ask of them.

A fork has its own process number, signals, environment, working directory and streams, as a started worker has. Not its own: what
libraries read of the environment when they are imported (they are offline), and the imports themselves.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from multiprocessing import reduction
from pathlib import Path
from typing import Any, NoReturn

import pytest

from afina.worker.__main__ import main as door

__all__ = ["FORKS", "ForkedWorkers", "exit_code_here", "run_here"]

#: Forks of a process that has imported what a training needs, and has trained nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["afina.worker.training.trainer", "afina.worker.training.results", "afina.worker.checks.model_check", __name__]
)


def run_here(*arguments: str | Path, env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    """`afina ARGUMENTS` in this process, its workers in forks; their standard error is not part of the answer."""
    out, err, words = io.StringIO(), io.StringIO(), [str(word) for word in arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code_here(words, env)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def exit_code_here(words: list[str], env: Mapping[str, str | None]) -> int:
    """That of `afina WORDS` in this process, its workers in forks; a variable that is None is removed."""
    from afina.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", ForkedWorkers)
        for name, value in env.items():
            patch.setenv(name, value) if value is not None else patch.delenv(name, raising=False)
        try:
            main(words)
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else bool(ended.code)
    return 0


class ForkedWorkers(subprocess.Popen):  # type: ignore[type-arg]
    """In the place of `subprocess.Popen`: `python -m afina.worker …` is a fork, every other command a process."""

    _fork: Any = None

    def __init__(self, *args: Any, constants: Mapping[str, object] = {}, **options: Any) -> None:
        """`constants` are those of the worker's modules that have another value in the fork."""
        self._constants = constants
        super().__init__(*args, **options)

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any, *rest: Any) -> None:  # fmt: skip
        words = None if isinstance(args, (str, bytes, Path)) else _words_of_worker([os.fsdecode(word) for word in args])
        if words is None:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)  # type: ignore[misc]
            return
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, _, _, _, _, new_session = rest[3:15]
        ends = (p2cread, c2pwrite, errwrite)
        streams = [_Stream(standard if end == -1 else end) for standard, end in enumerate(ends)]
        given = {os.fsdecode(name): os.fsdecode(value) for name, value in (os.environ if env is None else env).items()}
        self._fork = FORKS.Process(
            target=_become, args=(words, given, cwd, streams, new_session, self._constants), daemon=True
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_OFFLINE", "1")  # of the process that is forked, which the first start starts
            self._fork.start()
        self.pid, self._child_created = self._fork.pid, True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _internal_poll(self, *args: Any, **options: Any) -> int | None:
        if self._fork is None:
            return super()._internal_poll(*args, **options)  # type: ignore[misc, no-any-return]
        if self.returncode is None:
            self.returncode = self._fork.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._fork is None:
            return super()._wait(timeout)  # type: ignore[misc, no-any-return]
        self._fork.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


class _Stream:
    """An open file, which is passed on to a fork."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(passed: Any) -> int:
    return int(passed.detach())


def _words_of_worker(argv: Sequence[str]) -> list[str] | None:
    """The arguments of `python -m afina.worker …`; None for another command."""
    if argv[0] != sys.executable or "afina.worker" not in argv[:4]:
        return None
    return list(argv[argv.index("afina.worker") + 1 :])


def _become(
    words: list[str],
    env: Mapping[str, str],
    cwd: Any,
    streams: Sequence[int],
    new_session: bool,
    constants: Mapping[str, object],
) -> NoReturn:
    """`python -m afina.worker WORDS`."""
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(import_module(module), constant, value)
    if new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    if cwd is not None:
        os.chdir(cwd)
    os.execve = _exec
    _work(words, env)


def _exec(path: str, argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """A worker that becomes another goes on as that; an ordinary program replaces the process."""
    words = _words_of_worker(argv)
    if words is None:
        _EXECVE(path, argv, env)
    _work(words, env)


_EXECVE = os.execve


def _work(words: list[str], env: Mapping[str, str]) -> NoReturn:
    os.environ.clear()
    os.environ.update(env)
    sys.exit(door(words))
