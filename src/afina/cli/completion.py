"""Completion for bash, zsh and fish: commands and options by click, and here run names, keys of `--set` and files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from afina.errors import AfinaError, InputError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from pydantic import BaseModel

__all__ = ["COMMANDS", "complete_keys", "complete_runs", "recipe_keys"]

_SHELLS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/config.fish"}
#: bash and zsh put a blank behind a completed word; behind `train.epochs=` the value follows.
_NO_BLANK = {
    "bash": (
        "\n    return 0",
        "\n    [[ ${#COMPREPLY[@]} = 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n    return 0",
    ),
    "zsh": (
        "compadd -U -V unsorted -a completions",
        "if [[ ${completions[1]} == *= ]]; then compadd -U -S '' -V unsorted -a completions;"
        " else compadd -U -V unsorted -a completions; fi",
    ),
}


def complete_runs(context: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Short names of runs on scratch that begin so, then files."""
    from click.shell_completion import CompletionItem

    from afina.watch.find import known_runs, short_names

    names: list[str] = []
    with contextlib.suppress(AfinaError, OSError):
        names = [name for name in short_names(known_runs()) if name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


def complete_keys(context: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Keys of a recipe as `key=`; behind the sign the values of a choice."""
    from click.shell_completion import CompletionItem

    key, equals, value = incomplete.partition("=")
    if not equals:
        return [CompletionItem(f"{name}=") for name, _ in recipe_keys() if name.startswith(key)]
    chosen = next((field for name, field in recipe_keys() if name == key), None)
    choices = _choices(chosen.annotation) if chosen is not None else ()
    return [CompletionItem(f"{key}={choice}") for choice in choices if choice.startswith(value)]


def recipe_keys() -> Iterator[tuple[str, Any]]:
    """Every key of a recipe with its pydantic field: `train.epochs`."""
    from afina.recipe.explain import model_of
    from afina.recipe.keys.training_arguments import EFFECTIVE
    from afina.recipe.schema import Recipe

    def below(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, field in model.model_fields.items():
            inner = model_of(field.annotation)
            if inner is None:
                yield f"{prefix}{name}", field
            else:
                yield from below(inner, f"{prefix}{name}.")

    for key, field in below(Recipe, ""):
        if key == "train.arguments":
            yield from ((f"{key}.{name}", field) for name in EFFECTIVE)
        else:
            yield key, field


def _choices(annotation: Any) -> tuple[str, ...]:
    from typing import Literal, get_args, get_origin

    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    return tuple(choice for inner in get_args(annotation) for choice in _choices(inner))


@click.command()
@click.argument("shell", type=click.Choice(list(_SHELLS)), required=False)
@click.pass_context
def completion(context: click.Context, shell: str | None) -> None:
    """Print the script that completes commands, options, run names and keys of --set in SHELL, by default yours.

    \b
    Examples:
      eval "$(afina completion bash)"                       now, or as a line of ~/.bashrc
      eval "$(afina completion zsh)"                        or ~/.zshrc, after compinit
      afina completion fish | source                        or ~/.config/fish/config.fish
    """
    import os
    from pathlib import Path

    from click.shell_completion import get_completion_class

    shell = shell or Path(os.environ.get("SHELL", "")).name
    made = get_completion_class(shell) if shell in _SHELLS else None
    if made is None:
        raise InputError(
            f"{shell or 'SHELL is not set'}: no completion for this shell", f"name one: {', '.join(_SHELLS)}"
        )
    script = made(context.find_root().command, {}, "afina", "_AFINA_COMPLETE").source_template
    names = {"complete_func": "_afina_completion", "complete_var": "_AFINA_COMPLETE", "prog_name": "afina"}
    print(script.replace(*_NO_BLANK.get(shell, ("", ""))) % names)


COMMANDS = (completion,)
