"""Every row of a cross-validation as it was predicted out of fold: the predictions of all folds in one table, and those whose label is doubtful."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path
from typing import Any

from afina.errors import DataError, first_line
from afina.files import name_aside, write_atomic
from afina.statistics.label_quality import doubtful_rows
from afina.statistics.predictions import read_predictions
from afina.sweeps.sweep_dir import SweepDir, SweepRecord

__all__ = ["write_doubtful", "write_out_of_fold"]


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


def write_doubtful(home: SweepDir) -> tuple[list[dict[str, str]], Path | None]:
    """Write `doubtful_labels.csv` from `out_of_fold.parquet`: `doubtful_rows`, and `correct_label`, to be filled in; none of a regression.

    A file that is newer is left as it is, for it may have been corrected, and one that is older is kept under another name. Neither is read: a
    spreadsheet may have saved it with other delimiters or in another encoding.

    Returns: the rows, and where an older file is kept.

    Raises:
        DataError: the table is damaged, or the file cannot be written.
    """
    target: Path = home.doubtful
    rows, older = doubtful_rows(read_predictions(home.out_of_fold)), None
    try:
        if rows and not (target.is_file() and target.stat().st_mtime_ns >= home.out_of_fold.stat().st_mtime_ns):
            if target.is_file():
                names = (target.with_name(f"{target.stem}.{number}.csv") for number in itertools.count(1))
                older = target.rename(next(name for name in names if not name.exists()))
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, [*rows[0], "correct_label"])
            writer.writeheader()
            writer.writerows({name: _for_spreadsheets(name, value) for name, value in row.items()} for row in rows)
            write_atomic(target, text.getvalue().encode("utf-8-sig"))  # Excel takes a file without the mark for cp1252
    except OSError as error:
        raise DataError(f"{target.name}: {first_line(error)}", "make it writable, and show the table again") from None
    return rows, older


def _for_spreadsheets(name: str, value: str) -> str:
    """A text that a spreadsheet would compute or call an error ("=1+1", "- good") begins with an apostrophe."""
    return f"'{value}" if name.startswith("text") and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
