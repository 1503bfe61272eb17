"""Every row of a cross-validation as it was predicted out of fold: the predictions of all folds in one table, and those whose label is doubtful."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from afina.errors import DataError, first_line
from afina.files import name_aside, write_atomic
from afina.statistics.label_quality import label_quality
from afina.statistics.predictions import Predictions, read_predictions
from afina.sweeps.sweep_dir import SweepDir, SweepRecord

__all__ = ["write_doubtful", "write_out_of_fold"]

#: The most doubtful rows that are listed even where confident learning names fewer issues.
_LEAST = 100


def write_out_of_fold(home: SweepDir, record: SweepRecord) -> Path:
    """Write `out_of_fold.parquet`, unless it is newer than the predictions of all folds: those of each fold with `repeat` and `fold`,
    each row once for each repeat, in the order of the data.

    Raises:
        DataError: the predictions of a fold are gone, or a row is missing or there twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert record.folds is not None
    target: Path = home.out_of_fold
    paths = [home.run(cell.name).predictions for cell in record.cells]
    try:
        if target.is_file() and target.stat().st_mtime_ns > max(path.stat().st_mtime_ns for path in paths):
            return target
        tables = []
        for cell, path in zip(record.cells, paths, strict=True):
            repeat, fold = divmod((cell.fold or 1) - 1, record.folds)
            table = pq.read_table(path)
            file = table.schema.get_field_index("file")
            table = table.set_column(file, "file", table["file"].cast(pa.string()))  # a dictionary has no order
            for name, value in (("fold", fold + 1), ("repeat", repeat + 1)):
                table = table.add_column(0, name, pa.array([value] * len(table), pa.int32()))
            tables.append(table)
        whole = pa.concat_tables(tables).sort_by([(name, "ascending") for name in ("repeat", "file", "row")])
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{target.name}: {first_line(error)}", "were runs of this sweep removed? repeat its command"
        ) from None
    _check(whole, record, target)
    aside = name_aside(target)
    pq.write_table(whole, aside)
    aside.replace(target)
    return target


def _check(whole: Any, record: SweepRecord, target: Path) -> None:
    rows = (
        whole.select(["repeat", "file", "row"])
        .group_by(["file", "row"])
        .aggregate([("repeat", "count_distinct"), ("repeat", "count")])
    )
    repeats = len(record.cells) // (record.folds or 1)
    counts = {*rows["repeat_count"].to_pylist(), *rows["repeat_count_distinct"].to_pylist()}
    if counts != {repeats}:
        raise DataError(
            f"{target.name}: not every row is predicted once in each of {repeats} repeats",
            "were the runs of the sweep made from different data? start it anew with another --sweep DIR",
        )


def write_doubtful(home: SweepDir, record: SweepRecord) -> list[dict[str, str]]:
    """Write `doubtful_labels.csv` from `out_of_fold.parquet`: the issues, at least `_LEAST` rows, the most doubtful first; returns its rows. A file that
    is newer is left as it is, for it may have been corrected.

    Columns: rank, what identifies the row, its text, `label`, `suggested` (of several labels: `NAME?`, the one that is probably wrong), the
    `probability` of the label, a mean over repeats, `issue` (yes, or nothing), and `correct_label`, to be filled in. None is written of a regression.

    Raises:
        DataError: a file is damaged, or cannot be written.
    """
    target: Path = home.doubtful
    try:
        if not target.is_file() or target.stat().st_mtime_ns < home.out_of_fold.stat().st_mtime_ns:
            rows = _doubtful(read_predictions(home.out_of_fold), len(record.cells) // (record.folds or 1))
            if not rows:
                return []
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
            write_atomic(target, text.getvalue())
        with target.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{target.name}: {first_line(error)}", "remove it, and show the table again") from None


def _doubtful(rows: Predictions, repeats: int) -> list[dict[str, Any]]:
    import numpy as np

    if rows.scores is None:
        return []
    count = len(rows) // repeats  # sorted by repeat, then by row: each repeat has the same rows in the same order
    scores = rows.scores.reshape(repeats, count, -1).mean(0)
    first = replace(rows, truth=rows.truth[:count], scores=scores, table=rows.table.slice(0, count))
    quality, issue, other = label_quality(first)
    order = np.lexsort((np.arange(count), quality, ~issue))[: max(_LEAST, int(issue.sum()))]
    return [
        {
            "rank": rank,
            **first.about(int(i)),
            "label": _named(first, int(i)),
            "suggested": first.labels[other[i]] + ("?" if first.task == "multi-label" else ""),
            "probability": f"{quality[i]:.4f}",
            "issue": "yes" if issue[i] else "",
            "correct_label": "",
        }
        for rank, i in enumerate(order, start=1)
    ]


def _named(rows: Predictions, index: int) -> str:
    label = rows.table.column("label")[index].as_py()
    return ", ".join(label) if isinstance(label, list) else str(label)
