"""A Sphinx extension: completes pages from the code before they are parsed.

A comment `<!-- commands -->` in a page becomes the reference of all commands of `afina`, `<!-- api -->` that of the names in
`afina.__all__`, `<!-- arguments -->` the tables of training arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import click

import afina
from afina.cli import cli
from afina.recipe.keys import training_arguments as table

__all__ = ["api", "arguments", "commands", "setup"]


def commands() -> str:
    """Every visible command with its options, as Markdown; a group's commands follow it."""
    return "\n".join(_lines(cli, "afina"))


def _lines(group: click.Group, name: str) -> Iterator[str]:
    for title, command in sorted(group.commands.items()):
        if command.hidden:
            continue
        path = f"{name} {title}"
        context = click.Context(command, info_name=path)
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        yield f"\n## {path}\n\n```text\n{usage}\n```\n"
        yield from _help(inspect.cleandoc(command.help or ""))
        options = [p.get_help_record(context) for p in command.params if isinstance(p, click.Option)]
        if rows := [record for record in options if record is not None]:
            yield "\n| option | |\n|---|---|"
            yield from (f"| {_code(option)} | {_cell(text)} |" for option, text in rows)
        if isinstance(command, click.Group):
            yield from _lines(command, path)


def _help(text: str) -> Iterator[str]:
    """The help of a command: paragraphs, and what stands after click's `\\b` as it is."""
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("\b\n"):
            title, _, block = paragraph.removeprefix("\b\n").partition("\n")
            yield f"\n{title}\n\n```text\n{inspect.cleandoc(' ' + block)}\n```"
        else:
            yield f"\n{_cell(paragraph)}"


def _code(option: str) -> str:
    return f"`{option}`".replace("|", r"\|")


def _cell(text: str) -> str:
    """Text of a help message in a table: stars and brackets are themselves, code in backticks stays code."""
    parts = text.replace("\n", " ").replace("|", r"\|").split("`")
    for number in range(0, len(parts), 2):
        parts[number] = parts[number].replace("*", r"\*").replace("<", r"\<").replace("[", r"\[").replace("_", r"\_")
    return "`".join(parts)


def api() -> str:
    """The names in `afina.__all__` as directives of autodoc: functions first, then classes, then errors."""
    groups: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors": []}
    for name in sorted(afina.__all__):
        value: Any = getattr(afina, name)
        if not inspect.isclass(value):
            if callable(value):
                groups["Functions"].append(f".. autofunction:: afina.{name}")
        elif issubclass(value, Exception):
            groups["Errors"].append(f".. autoexception:: afina.{name}")
        else:
            groups["Classes"].append(f".. autoclass:: afina.{name}\n   :members:")
    return "\n".join(
        f"\n## {title}\n\n```{{eval-rst}}\n" + "\n\n".join(directives) + "\n```" for title, directives in groups.items()
    )


def arguments() -> str:
    """Every field of `TrainingArguments`: what it does, or what to use instead."""

    def rows(head: str, fields: Mapping[str, str]) -> str:
        lines = "\n".join(f"| `{name}` | {fields[name]} |" for name in sorted(fields))
        return f"\n\n| argument | {head} |\n|---|---|\n{lines}\n"

    values = "\n".join(f"| `{name}: {p}` | {why} | {remedy} |" for name, p, why, remedy in table.REFUSED_VALUES)
    return (
        f"## {len(table.EFFECTIVE)} take effect{rows('what it does', table.EFFECTIVE)}"
        f"\n## {len(table.RESERVED_ARGUMENTS)} are set by the recipe's own keys, or by afina{rows('instead', table.RESERVED_ARGUMENTS)}"
        f"\n## {len(table.INEFFECTIVE)} would change nothing, or make a resumed run differ{rows('instead', table.INEFFECTIVE)}"
        f"\n## Values that are refused\n\n| value | reason | instead |\n|---|---|---|\n{values}\n"
        f"\n## Names of other versions, and mistakes{rows('instead', table.FORMER)}"
    )


def _complete(app: Any, page: str, source: list[str]) -> None:
    for mark, text in (("<!-- commands -->", commands), ("<!-- api -->", api), ("<!-- arguments -->", arguments)):
        if mark in source[0]:
            source[0] = source[0].replace(mark, text())


def _one_sentence(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes `text: more` in the docstring of a property for `type: description`."""
    if what in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(": ", " – ")


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", _complete)
    app.connect("autodoc-process-docstring", _one_sentence, priority=100)
    return {"parallel_read_safe": True}
