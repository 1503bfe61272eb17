"""Fetches a Hub data set for `afina init`, and names its files: `python -m afina.worker peek`.

The question: {"site": a site, "hub": id, "config": name or null, "revision": …}. The answer: {"files": {split: path}}, Parquet
files. All of it is fetched, to the place where `afina prefetch` looks for it.
"""

from __future__ import annotations

import sys
from typing import Any

from afina.worker.reply import read_question

__all__ = ["answer"]


def answer(arguments: list[str]) -> dict[str, Any]:
    """The files of the data set by split.

    Raises:
        InputError, EnvironmentProblem: as `afina.worker.hub.datasets`.
    """
    from afina.recipe.schema import Data
    from afina.site.settings import Site
    from afina.worker.hub import datasets, pins

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    question = read_question("a question about data")
    site, hub = Site.model_validate(question["site"]), question["hub"]
    data = Data(hub=hub, config=question.get("config"), text=("text",), label=("label",))
    pin = pins.pin(site, "dataset", hub, question.get("revision"), say)
    fetched = datasets.fetch_data(site, data, pin, say)
    return {"files": {split: str(fetched.folder / name) for split, name in fetched.splits.items()}}
