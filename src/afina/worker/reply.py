"""How a stage answers the host: one JSON object as the last line of standard output, an error as one too; messages for people
go to standard error."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from afina.errors import AfinaError, EnvironmentProblem

__all__ = ["reply"]


class _Terminated(BaseException):
    """SIGTERM came: unwind, clean up, exit 143."""


def reply(work: Callable[[], dict[str, Any]], *, as_json: bool) -> int:
    """Do `work` and say what it returns; the exit code (see `afina.errors`), 130 after an interrupt, 143 after
    SIGTERM, 141 where nobody listens any more.

    Args:
        as_json: an error is the last line of standard output, for the caller to say it once; else a message.
    """
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with _full_disk():
            said = work()
        print(json.dumps(said, ensure_ascii=False), flush=True)
        return 0
    except AfinaError as error:
        if as_json:
            print(error.to_json(), flush=True)
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:  # the host was killed
        return 141
    except KeyboardInterrupt:
        return 130
    except _Terminated:
        return 143
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """A full disk, a spent quota, a folder that cannot be written to become one message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise EnvironmentProblem(
                f"{error.filename or 'the output'}: {error.strerror or error}",
                "free space or quota (`df -h`, `quota`), then run the same command again: it goes on where it was",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename is not None:
            raise EnvironmentProblem(
                f"{error.filename}: {error.strerror}", "choose a folder that you may write to"
            ) from error
        raise
