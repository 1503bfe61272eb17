"""Questions at a terminal, each with a default and an option that answers it beforehand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import click

from afina.errors import InputError

__all__ = ["Asker"]

T = TypeVar("T")


class Asker:
    """Asks with a default; silent, it takes the default."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent

    def __call__(self, question: str, default: str | None, option: str) -> str:
        if not self.silent:
            try:
                return str(click.prompt(question, default=default, err=True))
            except click.Abort:
                if sys.stdin.isatty():  # Ctrl-C, Ctrl-D
                    raise
            print(file=sys.stderr)
            raise InputError(f"no answer: {question}", f"give it with {option}, or take all defaults with --yes")
        if default is None:
            raise InputError(f"no default: {question}", f"give it with {option}")
        return default

    def confirm(self, question: str, otherwise: InputError) -> bool:
        """Yes or no; raises `otherwise` where nobody can answer."""
        if not self.silent:
            try:
                return click.confirm(question, default=True, err=True)
            except click.Abort:
                if sys.stdin.isatty():
                    raise
            print(file=sys.stderr)
        raise otherwise

    def checked(
        self, question: str, default: str | None, option: str, check: Callable[[str], T], given: str | None = None
    ) -> T:
        """The answer as converted by `check`; asks again where it refuses, and somebody is there to answer.

        Raises:
            AfinaError: `given`, or the default of a silent command, is refused.
        """
        if given is not None or self.silent:
            return check(given if given is not None else self(question, default, option))
        while True:
            answer = self(question, default, option)
            try:
                return check(answer)
            except InputError as error:
                print(f"{error}", file=sys.stderr)

    def show(self, text: str) -> None:
        if not self.silent:
            print(text, file=sys.stderr)
