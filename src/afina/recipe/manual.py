"""The keys of a recipe in words: the tables of docs/recipe.md, which a test compares with the schema, and the training arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from afina.errors import EnvironmentProblem
from afina.recipe.keys.training_arguments import EFFECTIVE

__all__ = ["KeyRow", "key_rows"]

#: Where the keys of a table stand in the recipe.
_PLACES = {
    "## Recipe": ("",),
    "## Data": ("data.",),
    "### Fold": ("data.fold.",),
    "### Part": ("data.train.", "data.eval.", "data.test."),
    "## Tokens": ("tokens.",),
    "### Windows": ("tokens.windows.",),
    "## Train": ("train.",),
    "### Early stopping": ("train.early_stopping.",),
    "## Adapter": ("adapter.",),
    "## Decisions": ("decisions.",),
    "## Resources": ("resources.",),
}


class KeyRow(NamedTuple):
    """One key, its default as the page writes it, and its meaning."""

    key: str
    default: str
    meaning: str


def key_rows() -> Iterator[KeyRow]:
    """Every key, in the order of the page; sections stand for their keys.

    Raises:
        EnvironmentProblem: the page is not installed.
    """
    places: tuple[str, ...] = ()
    for line in _page().splitlines():
        if line.startswith("#"):
            places = _PLACES.get(line.strip(), ())
        cells = line.strip().strip("|").split("|", 2)  # a meaning may show `|`
        if not places or len(cells) != 3:
            continue
        keys, default, meaning = re.findall(r"`([^`]+)`", cells[0]), _plain(cells[1]), _plain(cells[2])
        for place in places:
            yield from (KeyRow(place + key, default, meaning) for key in keys if not _is_section(f"{place}{key}"))
        if keys == ["arguments"]:
            yield from (KeyRow(f"train.arguments.{name}", "", _plain(text)) for name, text in EFFECTIVE.items())


def _is_section(key: str) -> bool:
    """True if a key is a section, whose own keys follow; of `train.arguments` the arguments do."""
    return key in (
        "data",
        "tokens",
        "tokens.windows",
        "train",
        "adapter",
        "decisions",
        "resources",
        "data.fold",
        "data.train",
        "data.eval",
        "data.test",
        "train.arguments",
        "train.early_stopping",
    )


def _plain(cell: str) -> str:
    """A cell of a table without Markdown: links to sections of the page are left out."""
    text = re.sub(r"[;,]? see \[[^]]*\]\([^)]*\)", "", cell)
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("\\|", "|").strip()


def _page() -> str:
    here = Path(__file__).resolve().parents[1]
    for page in (here / "_docs/recipe.md", here.parents[1] / "docs/recipe.md"):
        if page.is_file():
            return page.read_text(encoding="utf-8")
    raise EnvironmentProblem("docs/recipe.md is not installed with afina", "install afina again")
