"""Rows of Parquet files and of Hub data sets, for the host: `python -m afina.worker peek`.

The question: {"files": [...]} or {"site": a site, "hub": id, "config": name or null, "revision": …}, and "limit", rows of each
part at most. It reports {"part": name, "rows": how many there are} before the rows of each part, and {"row": {…}} for each row. A data
set from the Hub is fetched whole, to where `afina prefetch` finds it again. Labels that the file names (`ClassLabel`) come by
their names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from afina.worker.reply import read_question, report

__all__ = ["answer"]


def answer(arguments: list[str]) -> dict[str, Any]:
    """Report the rows; the answer names the parts."""
    question = read_question("a question about data")
    parts = _hub_parts(question) if question.get("hub") else {"all": [Path(name) for name in question["files"]]}
    for part, paths in parts.items():
        _report_rows(part, paths, question["limit"])
    return {"parts": list(parts)}


def _hub_parts(question: dict[str, Any]) -> dict[str, list[Path]]:
    from afina.recipe.schema import Data
    from afina.site.settings import Site
    from afina.worker.hub import datasets, pins

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    site = Site.model_validate(question["site"])
    data = Data(hub=question["hub"], config=question.get("config"), text=("text",), label=("label",))
    pin = pins.pin(site, "dataset", question["hub"], question.get("revision"), say)
    found = datasets.fetch_data(site, data, pin, say)
    return {split: [found.folder / name] for split, name in found.splits.items()}


def _report_rows(part: str, paths: list[Path], limit: int) -> None:
    import pyarrow.parquet as pq

    from afina.worker.data.readers import readable

    files = []
    for path in paths:
        with readable(path):
            files.append(pq.ParquetFile(path))
    report({"part": part, "rows": sum(file.metadata.num_rows for file in files)})
    left = limit
    for file in files:
        for row in _rows(file):
            if not left:
                return
            left -= 1
            report({"row": row}, flush=False)


def _rows(file: Any) -> Iterator[dict[str, Any]]:
    from afina.worker.data.readers import class_names

    names = class_names(file.schema_arrow.metadata or {})
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            for column, classes in names.items():
                value = row.get(column)
                if isinstance(value, int):
                    row[column] = classes[value] if 0 <= value < len(classes) else None
                elif isinstance(value, list):
                    row[column] = [classes[v] if isinstance(v, int) and 0 <= v < len(classes) else v for v in value]
            yield row
