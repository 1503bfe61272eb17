"""Processes of afina as forks of one that has imported PyTorch and Transformers, which costs more than what most tests ask of them.

A fork has its own process number, signals, environment, working directory, streams and command line, as a started process has. Not its
own: what libraries read of the environment when they are imported (they are offline), and the imports themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from multiprocessing import forkserver, reduction
from pathlib import Path
from typing import Any, NoReturn

import pytest

from afina.worker.__main__ import main as door

__all__ = ["FORKS", "ForkedWorkers", "exit_code_here", "run_forked", "run_here", "serve_forks"]

#: Forks of a process that has imported what a training needs, and has trained nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "afina.worker.training.trainer",
        "afina.worker.training.results.simple_models_beside",
        "afina.worker.checks.model_check",
        __name__,
    ]
)


@functools.cache
def serve_forks() -> None:
    """Start the process that is forked, offline: once, and before there are threads that read this process's environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        forkserver.ensure_running()


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


def run_forked(argv: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with its streams captured, of a command in a fork."""
    with ForkedWorkers(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


class _Forks(subprocess.Popen):  # type: ignore[type-arg]
    """In the place of `subprocess.Popen`: `python -m afina.…` or `tests.…` is a fork, every other command a process."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any, *rest: Any) -> None:  # fmt: skip
        call = None if isinstance(args, (str, bytes, Path)) else _call_of([os.fsdecode(word) for word in args])
        if call is None:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)  # type: ignore[misc]
            return
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _, _, _, _, _, new_session = rest[3:15]
        ends = [standard if end == -1 else end for standard, end in enumerate((p2cread, c2pwrite, errwrite))]
        given = {os.fsdecode(name): os.fsdecode(value) for name, value in (os.environ if env is None else env).items()}
        self.pid, self._child_created = self._forked(ends, (*call, given, cwd, new_session)), True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _forked(self, ends: Sequence[int], about: tuple[Any, ...]) -> int:
        """Start `_become(streams, *about)`, whose streams these are; its process number."""
        raise NotImplementedError


class ForkedWorkers(_Forks):
    """Forks of the process that has imported all; those that they start in turn are their own."""

    _fork: Any = None

    def __init__(self, *args: Any, constants: Mapping[str, object] = {}, **options: Any) -> None:
        """`constants` are those of the worker's modules that have another value in the fork."""
        self._constants = constants
        super().__init__(*args, **options)

    def _forked(self, ends: Sequence[int], about: tuple[Any, ...]) -> int:
        serve_forks()
        streams = [_Stream(end) for end in ends]
        self._fork = FORKS.Process(target=_become, args=(streams, *about, self._constants), daemon=True)
        self._fork.start()
        return int(self._fork.pid)

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


class _Children(_Forks):
    """Forks of this process, which is one itself, and their parent as it would be of processes that it starts."""

    def _forked(self, ends: Sequence[int], about: tuple[Any, ...]) -> int:
        if pid := os.fork():
            return pid
        code: Any = 1
        try:
            streams = [os.dup(end) for end in ends]
            _become(streams, *about)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code if isinstance(code, int) else bool(code))


class _Stream:
    """An open file, which is passed on to a fork."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(passed: Any) -> int:
    return int(passed.detach())


def _call_of(argv: Sequence[str]) -> tuple[str, list[str]] | None:
    """The module and the arguments of `python -m MODULE …`; None for another command, and for modules of others."""
    if argv[0] != sys.executable or "-m" not in argv[:-1]:
        return None
    at = argv.index("-m") + 1
    return (argv[at], list(argv[at + 1 :])) if argv[at].startswith(("afina.", "tests.")) else None


def _become(
    streams: Sequence[int],
    module: str,
    words: list[str],
    env: Mapping[str, str],
    cwd: Any,
    new_session: bool,
    constants: Mapping[str, object] = {},
) -> NoReturn:
    """`python -m MODULE WORDS`."""
    for name, value in constants.items():
        where, _, constant = name.rpartition(".")
        setattr(import_module(where), constant, value)
    if new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # else what its parent wrote to would have a reader as long as it lives
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    if cwd is not None:
        os.chdir(cwd)
    os.execve = _exec
    _work(module, words, env)


def _exec(path: str, argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """A worker that becomes another goes on as that; an ordinary program replaces the process."""
    call = _call_of(argv)
    if call is None:
        _EXECVE(path, argv, env)
    _work(*call, env)


_EXECVE = os.execve


def _work(module: str, words: list[str], env: Mapping[str, str]) -> NoReturn:
    _show([sys.executable, "-m", module, *words])
    os.environ.clear()
    os.environ.update(env)
    if module == "afina.worker":
        sys.exit(door(words))
    subprocess.Popen = _Children  # type: ignore[misc]
    import_module(module).main(words)
    sys.exit()


def _show(argv: Sequence[str]) -> None:
    """The command line of this process in /proc, in the place of the one that it was forked with; the words that fit."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, size = int(fields[45]), int(fields[46]) - int(fields[45])  # arg_start and arg_end, see proc(5)
    text = b""
    for word in argv:
        text += os.fsencode(word) + b"\0" if len(text) + len(os.fsencode(word)) < size else b""
    ctypes.memmove(start, text.ljust(size, b"\0"), size)
