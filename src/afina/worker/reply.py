"""How a worker answers its caller: lines of JSON on standard output, messages for people on standard error.

    {"progress": {…}}     what there is so far (rows done, a row, a finding); any number of lines
    {…}                   the answer; the last line
    {"failure": {…}}      in its place, an `afina.errors.Failure`

The question is JSON on standard input. `afina.run.workers` is the caller's side. Exit codes: 0, those of `afina.errors`, 130 after
an interrupt, 143 after SIGTERM, 141 where the caller has gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from afina.errors import AfinaError, Failure, InputError, first_line
from afina.redact import redact
from afina.worker.disk_errors import disk_errors

__all__ = ["Terminated", "not_a_question", "read_question", "reply", "report"]


class Terminated(BaseException):
    """SIGTERM came: unwind, clean up, exit 143."""


def reply(work: Callable[[], dict[str, Any]], *, as_json: bool) -> int:
    """Do `work` and print what it returns as the answer; returns the exit code.

    Args:
        as_json: a failure is the last line of standard output, for a program; else a message on standard error.
    """
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _until_interrupted(work, as_json)
        # After an interrupt SIGTERM is ignored until the exit: the watch over the caller may send it just after a write has failed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if code in (130, 141) else previous)
    except Terminated:
        code = 143
    if code not in (130, 141, 143):
        return code
    with contextlib.suppress(OSError, ValueError):
        # Nobody reads what is still in the buffer: it must not fail at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _until_interrupted(work: Callable[[], dict[str, Any]], as_json: bool) -> int:
    try:
        return _reply(work, as_json)
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        return 130


def _reply(work: Callable[[], dict[str, Any]], as_json: bool) -> int:
    try:
        with disk_errors():
            answer = work()
    except Exception as error:
        if isinstance(error, AfinaError):
            failure = _redacted(error.failure)
        elif as_json and not isinstance(error, BrokenPipeError):
            traceback.print_exc()  # a defect of afina, or of a library
            message = f"{type(error).__name__}: {first_line(error)}"
            failure = _redacted(Failure("AfinaError", message, "see the lines above, and report it if it is afina's"))
        else:
            raise
        if as_json:
            print(json.dumps({"failure": failure.to_dict()}, ensure_ascii=False), flush=True)
        else:
            print(f"error: {failure}", file=sys.stderr, flush=True)
        return failure.exit_code
    print(json.dumps(answer, ensure_ascii=False), flush=True)
    return 0


def report(progress: dict[str, Any], *, flush: bool = True) -> None:
    """Print what there is so far; many small lines go together where `flush` is False."""
    print(json.dumps({"progress": progress}, ensure_ascii=False, default=str), flush=flush)


def read_question(what: str) -> Any:
    """The JSON on standard input. From here on this process ends with its caller.

    Args:
        what: what is expected, for the message: "a plan".

    Raises:
        InputError: it is not JSON.
    """
    text = sys.stdin.read()
    _end_with_caller()
    try:
        return json.loads(text)
    except ValueError as error:
        raise not_a_question(what, str(error)) from None


def not_a_question(what: str, why: str) -> InputError:
    """The error for standard input that holds something else."""
    return InputError(
        f"standard input is not {what}: {why}", "this command is called by `afina`; by hand give it what `afina` would"
    )


def _redacted(failure: Failure) -> Failure:
    return replace(failure, message=redact(failure.message), remedy=redact(failure.remedy))


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # cleaning up is not interrupted; SIGKILL is left
    raise Terminated


def _end_with_caller() -> None:
    """Terminate this process when its caller is gone, killed perhaps: a pipe that nobody reads reports an error."""
    output = sys.__stdout__.fileno() if sys.__stdout__ is not None else -1
    if output < 0 or not stat.S_ISFIFO(os.fstat(output).st_mode):
        return
    poll = select.poll()
    poll.register(output, 0)

    def wait() -> None:
        poll.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="caller", daemon=True).start()
