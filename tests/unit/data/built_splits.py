"""Splits built of rows that a test writes down."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import write_csv, write_jsonl

from afina.errors import AfinaError, DataError, RecipeError
from afina.recipe.keys.data_keys import Data
from afina.worker.data.labels.find_labels import Labels
from afina.worker.data.splits.build_splits import build_splits
from afina.worker.data.splits.choose_sources import choose_sources
from afina.worker.data.tables.data_table import DataTable, Examples, read_files

Rows = list[dict[str, Any]]


def build(
    folder: Path, files: dict[str, Rows], task: str = "auto", kind: str = "csv", **data: Any
) -> tuple[Labels, dict[str, Examples], list[str]]:
    write = {"csv": write_csv, "jsonl": write_jsonl}[kind]
    paths = {part: write(folder / f"{part}.{kind}", rows) for part, rows in files.items()}
    data = {"text": "text", "label": "label", **data}
    spec = Data.model_validate({"files": {part: str(path) for part, path in paths.items()}, **data})
    warnings: list[str] = []
    sources = choose_sources(spec, list(paths), warnings)
    tables: dict[str, DataTable] = {
        source: read_files(
            [paths[source]],
            [*spec.label, *(name for name in (spec.id, spec.split_column, spec.group) if name is not None)],
            spec.text,
            ids=[spec.id] if spec.id else [],
        )
        for source in set(sources.values())
    }
    labels, parts = build_splits(task, spec, tables, sources, warnings)
    return labels, parts, warnings


def reviews(n: int, labels: str = "abc", start: int = 0) -> Rows:
    return [{"text": f"text {i}", "label": labels[i % len(labels)], "n": i} for i in range(start, start + n)]


def refused(*args: Any, **kwargs: Any) -> AfinaError:
    with pytest.raises((DataError, RecipeError)) as error:
        build(*args, **kwargs)
    assert error.value.remedy
    return error.value


SHARES = [Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]


def both(rows: Rows) -> dict[str, Rows]:
    return {"train": rows, "eval": [{**r, "text": f"other {r['text']}"} for r in rows]}
