"""Every error that a user can meet, with its exit code and its remedy.

    AfinaError                exit code
    ├── InputError            2    the user's input: recipe, data, command line
    │   ├── RecipeError            a key or value of a recipe, with file and line
    │   ├── DataError              a file, row or column of the data
    │   └── ClaimedError           a run directory that is already in use
    ├── EnvironmentProblem    3    the machine, the cluster, the site, the Hub
    │   ├── SiteError              scratch, image, binds, `site.env`
    │   ├── HubError               the Hub refused, or cannot be reached
    │   └── SlurmError             a Slurm command that is missing or refused
    └── TrainingError         4    the training itself failed

Exit code 0 is a finished run, 75 (`EX_TEMPFAIL`) a stopped one that can be resumed. Errors that are not in this tree
are defects of afina: they keep their traceback.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

__all__ = [
    "EXIT_ENVIRONMENT",
    "EXIT_FAILED",
    "EXIT_FINISHED",
    "EXIT_INPUT",
    "EXIT_STOPPED",
    "AfinaError",
    "ClaimedError",
    "DataError",
    "EnvironmentProblem",
    "HubError",
    "InputError",
    "RecipeError",
    "SiteError",
    "SlurmError",
    "TrainingError",
    "nearest",
]

EXIT_FINISHED = 0
EXIT_INPUT = 2
EXIT_ENVIRONMENT = 3
EXIT_FAILED = 4
EXIT_STOPPED = 75


class AfinaError(Exception):
    """What went wrong, and what to do about it.

    Args:
        message: what was found, where, and what is allowed.
        remedy: what the user can do next; printed on a line of its own.
        cause: one word for who decides whether to try again (`afina.run.supervise`): loss, disk, node, claimed, …
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "", *, cause: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message

    def to_json(self) -> str:
        return json.dumps({"error": type(self).__name__, "message": self.message, "remedy": self.remedy})

    def __reduce__(self) -> tuple[type[AfinaError], tuple[str, str]]:
        return type(self), (self.message, self.remedy)


class InputError(AfinaError):
    exit_code = EXIT_INPUT


class RecipeError(InputError):
    pass


class DataError(InputError):
    pass


class ClaimedError(InputError):
    pass


class EnvironmentProblem(AfinaError):
    exit_code = EXIT_ENVIRONMENT


class SiteError(EnvironmentProblem):
    pass


class HubError(EnvironmentProblem):
    pass


class SlurmError(EnvironmentProblem):
    pass


class TrainingError(AfinaError):
    exit_code = EXIT_FAILED


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean …' for the known name that looks most like `name`, or an empty string."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:
        folded = {candidate.casefold(): candidate for candidate in names}
        close = [folded[k] for k in difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)]
    return f"did you mean `{close[0]}`?" if close else ""
