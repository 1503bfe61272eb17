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
    ├── TrainingError         4    the training itself failed
    │   ├── Failed                 a run that was waited for has failed; its exit code is the outcome's
    │   ├── Stopped          75    … was stopped, and can be resumed
    │   └── Cancelled        75    … was cancelled, and can be resumed
    └── WaitTimeout          75    a run is still queued or running; also a TimeoutError

Exit code 0 is a finished run, 75 (`EX_TEMPFAIL`) a stopped one that can be resumed. Errors that are not in this tree
are defects of afina: they keep their traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = [
    "EXIT_ENVIRONMENT",
    "EXIT_FAILED",
    "EXIT_FINISHED",
    "EXIT_INPUT",
    "EXIT_STOPPED",
    "AfinaError",
    "Cancelled",
    "ClaimedError",
    "DataError",
    "EnvironmentProblem",
    "Failed",
    "Failure",
    "HubError",
    "InputError",
    "RecipeError",
    "SiteError",
    "SlurmError",
    "Stopped",
    "TrainingError",
    "WaitTimeout",
    "check_argument",
    "check_overrides",
    "first_line",
    "is_out_of_memory",
    "nearest",
    "nearest_name",
]

EXIT_FINISHED = 0
EXIT_INPUT = 2
EXIT_ENVIRONMENT = 3
EXIT_FAILED = 4
EXIT_STOPPED = 75


@dataclass(frozen=True)
class Failure:
    """An error as data: it crosses processes, JSON and pickles, and becomes an `AfinaError` again.

    Attributes:
        kind: the error's name in the tree above; another name becomes a plain `AfinaError`.
        message: what was found, where, and what is allowed.
        remedy: what the user can do next.
        cause: one word that decides whether to try again (`afina.run.requeue`): loss, disk, node, claimed, …
        nodes: where the cause is `node`, the nodes that cannot run the job.
    """

    kind: str
    message: str
    remedy: str = ""
    cause: str = ""
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message

    @property
    def exit_code(self) -> int:
        return _KINDS.get(self.kind, AfinaError).exit_code

    @classmethod
    def of_exit_code(cls, code: int, message: str, remedy: str = "", cause: str = "") -> Failure:
        """A failure of which only the exit code is known: 2 is bad input, 3 the environment, any other the training."""
        kind = {EXIT_INPUT: InputError, EXIT_ENVIRONMENT: EnvironmentProblem}.get(code, TrainingError)
        return cls(kind.__name__, message, remedy, cause)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Failure:
        """The failure that `to_dict` wrote; keys of a newer afina are ignored.

        Raises:
            TypeError: kind or message is missing.
        """
        known = {field.name for field in fields(cls)}
        failure = cls(**{key: item for key, item in value.items() if key in known})
        return replace(failure, nodes=tuple(failure.nodes))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def error(self) -> AfinaError:
        """The exception of this failure, to be raised."""
        kind = _KINDS.get(self.kind, AfinaError)
        return kind(self.message, self.remedy, cause=self.cause, nodes=self.nodes)


class AfinaError(Exception):
    """An error and its remedy; the arguments are those of `Failure`."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "", *, cause: str = "", nodes: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.failure = Failure(type(self).__name__, message, remedy, cause, nodes)

    @property
    def message(self) -> str:
        return self.failure.message

    @property
    def remedy(self) -> str:
        return self.failure.remedy

    @property
    def cause(self) -> str:
        return self.failure.cause

    def __str__(self) -> str:
        return str(self.failure)

    def __reduce__(self) -> tuple[Any, ...]:
        return Failure.error, (self.failure,)

    def about(self, what: str) -> AfinaError:
        """The same error, whose message begins with what it is about: `cell a: …`."""
        return self.reworded(f"{what}: {self.message}")

    def reworded(self, message: str) -> AfinaError:
        """The same error with another message."""
        return replace(self.failure, message=message).error()


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


class Failed(TrainingError):
    pass


class Stopped(TrainingError):
    exit_code = EXIT_STOPPED


class Cancelled(TrainingError):
    exit_code = EXIT_STOPPED


class WaitTimeout(AfinaError, TimeoutError):
    exit_code = EXIT_STOPPED


_KINDS: dict[str, type[AfinaError]] = {
    kind.__name__: kind
    for kind in (InputError, RecipeError, DataError, ClaimedError, EnvironmentProblem, SiteError, HubError, SlurmError, TrainingError,
                 Failed, Stopped, Cancelled, WaitTimeout)
}  # fmt: skip


def check_argument(
    name: str,
    value: object,
    kinds: tuple[type, ...],
    what: str,
    *,
    least: int | None = None,
    of: tuple[type, ...] = (object,),
    required: bool = False,
) -> None:
    """Refuse an argument of a Python function that is of another type; None is left to the caller.

    Args:
        kinds: the types that it may have; a boolean is not a number.
        what: the same in words: "a path".
        least: the smallest number.
        of: the types that the elements of a list or tuple may have.
        required: None is refused too.

    Raises:
        InputError: with the argument's name and what was found.
    """
    fits = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    if isinstance(value, list | tuple):
        fits = fits and all(isinstance(one, of) for one in value)
    if (value is not None or required) and not (fits and (least is None or value >= least)):  # type: ignore[operator]
        limit = "" if least is None else f", {least} or more"
        raise InputError(f"{name}: must be {what}{limit}; found {value!r}", "correct the argument")


def check_overrides(overrides: object) -> None:
    """Refuse what is not a list of texts.

    Raises:
        InputError: with what was found.
    """
    check_argument(
        "overrides", overrides, (list, tuple), 'a list of texts such as ["train.epochs=1"]', of=(str,), required=True
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the error's class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


#: The words of torch for memory of a GPU and of the host, and of the system: not all of them raise a MemoryError.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True of an error of a library that got no memory, on the host or on a GPU."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`; None where none does."""
    import difflib  # only a mistake needs it

    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:
        folded = {candidate.casefold(): candidate for candidate in names}
        close = [folded[k] for k in difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)]
    return close[0] if close else None


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean …' for the known name that looks most like `name`, or an empty string."""
    close = nearest_name(name, known)
    return "" if close is None else f"did you mean `{close}`?"
