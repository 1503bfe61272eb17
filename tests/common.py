"""Shared by all suites: the repository's root, the README's commands, nasty names, a small program for PATH."""

from __future__ import annotations

import datetime
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

__all__ = ["LONG", "NASTY", "ROOT", "program", "readme_block", "some_of"]

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]

#: `AFINA_LONG=1 make test-series`: series in full.
LONG = bool(os.environ.get("AFINA_LONG"))

#: Names of files and folders that a careless shell, pattern, format or option parser trips over.
NASTY = [
    "two words",
    "it's",
    'a "quoted" word',
    "'; echo foo",
    "$(touch pwned)",
    "`touch pwned`",
    "$HOMEless",
    "smörgås ☃",
    "comma, colon: x=1",
    "100%j %%n %d %s",
    "[1]*?",
    "-rf",
    "~nobody",
    "{run}",
    "#hash & more",
    "back\\040slash",
    "line\nbreak",
]


def some_of(cases: Iterable[T], count: int) -> list[T]:
    """`count` of the cases of a series, others on each day, in their order; all of them if AFINA_LONG is set."""
    cases = list(cases)
    if LONG:
        return cases
    # By date, so that all processes of a session draw the same.
    drawn = random.Random(datetime.date.today().toordinal()).sample(range(len(cases)), min(count, len(cases)))
    return [cases[n] for n in sorted(drawn)]


def program(folder: Path, name: str, body: str) -> Path:
    """Write a small executable for PATH: a Bash script, unless `body` has its own first line."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(body if body.startswith("#!") else "#!/bin/bash\n" + body)
    path.chmod(0o755)
    return path


def readme_block(language: str, after: str = "") -> list[str]:
    """The lines of the README's first block in `language`, or of the first one after the text `after`."""
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.search(rf"```{language}\n(.*?)```", text.partition(after)[2] if after else text, re.DOTALL)
    assert found is not None, f"no {language} block after {after!r}"
    return found.group(1).splitlines()
