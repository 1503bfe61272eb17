"""JobRequest: what a caller asks for besides the recipe, as one frozen value.

The command line and the Python functions build it once; everything below them takes it. None means the recipe's own value,
or the site's default.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, get_args

from afina.errors import InputError, check_argument, check_overrides, nearest

__all__ = ["JobOptions", "JobRequest", "SubmitOptions", "Via", "accepts"]

F = TypeVar("F", bound=Callable[..., Any])
#: `local`: on this machine, in the background.
Via = Literal["sbatch", "submitit", "local"]
#: The least that can be asked for.
_LEAST = {"nodes": 1, "gpus_per_node": 0, "time_min": 1, "num_processes": 1}


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A caller's request.

    Raises:
        InputError: a value of the wrong type, or one that cannot be; with the argument's name.

    Attributes:
        overrides: `key=value` each, over the recipe.
        site: the site file.
        run: the new run directory; by default one under `<scratch>/runs/`.
        nodes, gpus_per_node: of the job; 0 GPUs trains on the CPU.
        time_min: the job's time limit in minutes.
        num_processes: train on this machine alone, with so many processes.
        via: how a job is submitted; `local` trains on this machine, in the background.
        rehearse: first make a few steps and a save here; submit only if they succeed.
        slurm: options of sbatch for this submission, e.g. `{"partition": "gpu"}`.
        after: runs, or numbers of jobs, that must finish first.
        in_job: inside the allocation: the site is the environment's.
    """

    overrides: Sequence[str] = ()
    site: str | Path | None = None
    run: str | Path | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    time_min: int | None = None
    num_processes: int | None = None
    via: Via = "submitit"
    rehearse: bool = False
    slurm: Mapping[str, Any] = field(default_factory=dict)
    after: Sequence[Any] = ()
    in_job: bool = False

    def __post_init__(self) -> None:
        check_overrides(self.overrides)
        object.__setattr__(self, "overrides", tuple(self.overrides))
        check_argument("rehearse", self.rehearse, (bool,), "True or False", required=True)
        check_argument("slurm", self.slurm, (Mapping,), "a mapping of sbatch's options")
        check_argument("after", self.after, (list, tuple), "a list of runs")
        for name, least in _LEAST.items():
            check_argument(name, getattr(self, name), (int,), "a whole number", least=least)
        for name in ("site", "run"):
            check_argument(name, getattr(self, name), (str, Path), "a path")
        if self.via not in get_args(Via):
            choices = ", ".join(get_args(Via))
            raise InputError(
                f"via: must be one of {choices}, found {self.via!r}",
                nearest(str(self.via), get_args(Via)) or f"choose from: {choices}",
            )

    def check_via(self) -> None:
        """Refuse options that have no effect with this `via`.

        Raises:
            InputError: with the option's name.
        """
        local = self.via == "local"
        for name in ("nodes", "gpus_per_node", "time_min", "slurm", "after") if local else ("num_processes",):
            if getattr(self, name) not in (None, (), [], {}):
                where = "on this machine" if local else "on a job of Slurm"
                raise InputError(f"{name}: has no effect {where} (via={self.via!r})", "leave it out")

    def resources(self) -> dict[str, int]:
        """The recipe's `resources` that are asked for otherwise."""
        nodes = 1 if self.num_processes is not None else self.nodes
        requested = {"nodes": nodes, "gpus_per_node": self.gpus_per_node, "time": self.time_min}
        return {name: value for name, value in requested.items() if value is not None}


class JobOptions(TypedDict, total=False):
    """Keywords of the Python functions that describe a job; see `JobRequest`."""

    overrides: Sequence[str]
    site: str | Path | None
    nodes: int | None
    gpus_per_node: int | None
    time_min: int | None


class SubmitOptions(JobOptions, total=False):
    """Keywords of `afina.submit`; see `JobRequest`."""

    run: str | Path | None
    via: Via
    rehearse: bool
    slurm: Mapping[str, Any]
    after: Sequence[Any]
    num_processes: int | None


def accepts(options: type, *values: type) -> Callable[[F], F]:
    """Decorate a function that takes `**options`: `help` lists the keywords, and an unknown one is a TypeError.

    Args:
        options: the TypedDict of its keywords.
        values: the dataclasses that the keywords are fields of; they have the defaults.
    """
    defaults = {f.name: {} if f.default is MISSING else f.default for value in values for f in fields(value)}

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        plain = [
            parameter for parameter in own.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
            for name, annotation in options.__annotations__.items()
        ]
        signature = own.replace(parameters=[*plain, *keywords])

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            signature.bind(*args, **kwargs)
            return function(*args, **kwargs)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate
