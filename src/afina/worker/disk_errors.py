"""Errors of the disk, read in one place: full, over a quota, a limit on the size of files, broken, closed to this user.

torch and safetensors write in C++ and Rust, and their errors do not keep the system's number: they are known by their words.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from afina.errors import EnvironmentProblem, first_line
from afina.files import permission_remedy
from afina.text import size_in_words

__all__ = ["disk_errors", "disk_problem"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
#: The system's words in an error without its number.
_WORDS = {
    "no space left": errno.ENOSPC,
    "quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
    "input/output error": errno.EIO,
}
_NUMBER = re.compile(r"os error (\d+)\b")
#: torch's words for a write that came to nothing, whatever the reason was (torch 2.13).
_INCOMPLETE = re.compile(r"unexpected pos|file write failed|PytorchStreamWriter failed", re.IGNORECASE)


def disk_problem(error: BaseException, folder: Path | None, again: str) -> EnvironmentProblem | None:
    """The error as a problem of the disk with its remedy; None where it is another one.

    Args:
        folder: where the work writes.
        again: what continues the work: "`afina resume`".
    """
    name = getattr(error, "filename", None)
    what = f"{name or folder or 'the output'}: {getattr(error, 'strerror', None) or first_line(error)}"
    number = _number_of(error)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if number == errno.EFBIG or (number == 0 and limit != resource.RLIM_INFINITY):
        allowed = f"{limit:,} bytes here" if limit != resource.RLIM_INFINITY else "the file system's"
        remedy = f"raise the limit on the size of files ({allowed}, `ulimit -f`) in the site file or ask for it, then {again}"
        return EnvironmentProblem(what, remedy, cause="disk")
    if number in (0, *_FULL):
        free = f"; {_free(folder)} are free on the file system of {folder}" if folder and folder.exists() else ""
        remedy = f"free space or quota (`df -h`, `df -i`, `quota`), then {again}"
        return EnvironmentProblem(f"{what}{free}", remedy, cause="disk")
    if number == errno.EIO:
        remedy = f"the file system is broken or its server is gone: tell the administrators; once it works, {again}"
        return EnvironmentProblem(what, remedy, cause="disk")
    if number in _CLOSED and name is not None:
        return EnvironmentProblem(what, permission_remedy(Path(os.fsdecode(name))))
    return None


@contextlib.contextmanager
def disk_errors(folder: Path | None = None) -> Iterator[None]:
    """Turn errors of the disk into one message.

    Args:
        folder: where the block writes; every error of a file in it counts.
    """
    try:
        yield
    except OSError as error:
        problem = disk_problem(error, folder, "run the same command again: it resumes")
        if problem is None and folder is not None and str(error.filename or "").startswith(str(folder)):
            problem = EnvironmentProblem(f"{error.filename}: {error.strerror}", f"check {folder}")
        if problem is None:
            raise
        raise problem from error


def _number_of(error: BaseException) -> int | None:
    """The system's number of an error; 0 where a write was incomplete for a reason that is not known; None of other errors."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    text = str(error)
    if match := _NUMBER.search(text):
        return int(match[1])
    known = [number for words, number in _WORDS.items() if words in text.lower()]
    return known[0] if known else 0 if _INCOMPLETE.search(text) else None


def _free(folder: Path) -> str:
    return size_in_words(shutil.disk_usage(folder).free)
