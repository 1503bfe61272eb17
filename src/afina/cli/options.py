"""What several commands share: the options of a recipe, a time on the command line, how a run's end is told."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from afina.errors import AfinaError, InputError

__all__ = ["again", "finish", "following", "minutes_of", "recipe_options"]

F = TypeVar("F", bound=Callable[..., Any])


def recipe_options(command: F) -> F:
    for decorate in (
        click.option(
            "--site",
            metavar="FILE",
            help="Site file; by default $AFINA_SITE, slurm/site.env, ~/.config/afina/site.env.",
        ),
        click.option(
            "--set",
            "overrides",
            metavar="KEY=VALUE",
            multiple=True,
            help="Overrule a key of the recipe, e.g. train.learning_rate=3e-5.",
        ),
        click.argument("recipe"),
    ):
        command = decorate(command)
    return command


def finish(run: Any, as_json: bool) -> None:
    """Say how the run ended, and exit with its code."""
    outcome = run.outcome
    if outcome is None:
        raise AfinaError(f"{run.path}: no outcome was recorded", "see the logs in attempts/")
    if as_json:
        print(json.dumps({"run": str(run.path), **outcome.model_dump()}, ensure_ascii=False))
    elif outcome.outcome == "failed":
        print(f"error: {outcome.error}\n  run: {run.path}", file=sys.stderr)
    else:
        print(f"afina: {outcome.outcome}: {run.path}")
    sys.exit(outcome.exit_code)


def again(command: str, recipe: str, overrides: Sequence[str] = (), site: str | None = None) -> str:
    """Another command for the same recipe, as a shell takes it."""
    words = ["afina", command, recipe, *(word for value in overrides for word in ("--set", value))]
    return shlex.join([*words, *(["--site", site] if site else [])])


def following(run: Any) -> str:
    """How to watch a run that was just submitted, in a line."""
    from afina.watch.overview import short_names

    name = shlex.quote(short_names([run.path])[0])
    return f"afina: watch it with `afina status {name} --watch`, read along with `afina logs {name} -f`"


def minutes_of(text: str | None) -> int | None:
    from pydantic import ValidationError

    from afina.recipe.schema import Resources

    if text is None:
        return None
    try:
        return Resources.model_validate({"time": text}).time
    except ValidationError as error:
        raise InputError(
            f"--time {text}: {error.errors()[0]['msg'].removeprefix('Value error, ')}",
            "for example --time 90 or --time 2:30:00",
        ) from None
