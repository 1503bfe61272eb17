"""Cross-validation: folds as one array, all rows predicted out of fold in one table, two of them compared."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.conftest import Ran
from tests.unit.statistics.test_scores import write
from tests.unit.sweeps.conftest import GRID, array_of, end

from afina.errors import DataError, InputError
from afina.reports import compare as compare_page
from afina.reports.collection import collection_page
from afina.reports.compare import compare
from afina.run.directory import RunDir
from afina.statistics.intervals import paired_t_test
from afina.sweeps.sweep import Sweep


def _predicted(run: RunDir, rows: range, *, always: str = "") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["yx"[row % 2] for row in rows]
    sure = [0.1 if row == 3 else 0.9 - row / 100 for row in rows]  # that the label is right: of row 3 it is wrong
    x = [p if name == "x" else 1 - p for name, p in zip(names, sure, strict=True)]
    table = {"row": list(rows), "file": pa.array(["a.csv"] * len(rows)).dictionary_encode(), "label": names}
    texts = ["=1+1" if row == 7 else f"text\n<{row}>" for row in rows]
    table |= {"text": texts, "prediction": [always or ("x" if p > 0.5 else "y") for p in x]}
    pq.write_table(pa.table({**table, "score: x": x, "score: y": [1 - p for p in x]}), run.predictions)


def test_folds_are_one_array_over_one_store_and_one_table_of_all_rows(
    sweep: Callable[..., Sweep], prepared: list[Any], submitted: Callable[[], list[list[str]]]
) -> None:
    import pyarrow.parquet as pq

    made = sweep(folds=2, repeats=2)
    assert len(prepared) == 1 and [array_of(words) for words in submitted()] == ["0-3"]
    assert [cell.name for cell in made.record.cells] == [f"repeat={r},fold={n}" for r in (1, 2) for n in (1, 2)]
    runs = [made.dir.run(cell.name) for cell in made.record.cells]
    assert [run.prepared()["rows"] for run in runs] == [
        {"train": train, "eval": 10 - train, "test": 3} for train in (6, 4, 5, 5)
    ]
    for run, score, rows in zip(runs, (0.8, 0.9, 0.7, 0.8), ((0, 4), (4, 10), (0, 5), (5, 10)), strict=True):
        end(run, "finished", score, next="end")
        _predicted(run, range(*rows))
    table = made.table()
    (row,) = table.rows
    assert row.values == {1: 0.8, 2: 0.9, 3: 0.7, 4: 0.8} and row.interval is not None and row.interval.low is not None
    half = 3.1824463 * float(np.std([0.8, 0.9, 0.7, 0.8], ddof=1)) * math.sqrt(1 / 4 + 1)
    assert row.interval.mean - row.interval.low == pytest.approx(half)
    assert row.interval.mean + half > 1 and row.interval.high == 1, "no accuracy is more"
    assert (
        "Nadeau and Bengio" in str(table)
        and "  folds × repeats  " in str(table)
        and "out_of_fold.parquet" in str(table)
    )
    assert pq.read_table(made.dir.out_of_fold).select(["repeat", "fold", "row"]).to_pydict() == {
        "repeat": [1] * 10 + [2] * 10,
        "fold": [1] * 4 + [2] * 6 + [1] * 5 + [2] * 5,
        "row": [*range(10)] * 2,
    }
    first, *others = table.doubtful
    assert (first["row"], first["label"], first["suggested"], first["probability"], first["issue"]) == (
        "3",
        "x",
        "y",
        "0.1000",
        "yes",
    )
    assert [row["row"] for row in others] == list("987654210"), "those without an issue by their probability"
    assert "a.csv:3  x      y          0.1000    text <3>" in str(table) and table.to_dict()["doubtful"][0] == first
    corrected = made.dir.doubtful.read_text().replace("yes,", "yes,y", 1).replace(",", ";").encode("cp1252", "replace")
    made.dir.doubtful.write_bytes(corrected)  # as a spreadsheet saves it
    assert made.table().doubtful[0] == first and made.dir.doubtful.read_bytes() == corrected
    for texts in (True, False):
        charts, page = collection_page(made.path, [run.path for run in runs], made.path / "report", texts=texts)
        html = page(dict.fromkeys((chart.key for chart in charts), ""))
        assert "Northcutt" in html and ("&lt;3&gt;" in html) == texts and "<3>" not in html
    _predicted(runs[0], range(4))
    kept = made.path / "doubtful_labels.1.csv"
    assert f"the file of before is kept: {kept}" in str(made.table()) and kept.read_bytes() == corrected
    with made.dir.doubtful.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {**first, "correct_label": ""} and "'=1+1" in [row["text"] for row in rows]
    for run, rows_of in zip(runs, ((0, 4), (4, 10), (0, 5), (5, 10)), strict=True):
        _predicted(run, range(*rows_of), always="x")
    assert "Labels that models of no use doubt" in str(made.table())
    _predicted(runs[0], range(5))
    with pytest.raises(DataError, match="not every row is predicted once in each of 2 repeats"):
        made.table()
    with pytest.raises(InputError, match="was made with --folds 2"):
        sweep(GRID, directory=made.path)
    assert len(sweep(folds=2, repeats=3, directory=made.path).record.cells) == 6


def test_two_cross_validations_are_compared_over_the_same_folds(sweep: Callable[..., Sweep]) -> None:
    sweeps = [sweep(folds=3, overrides=[f"train.learning_rate={rate}"]) for rate in ("1e-3", "2e-3")]
    assert sweeps[0].path != sweeps[1].path and sweeps[0].path.name.endswith("-3-folds")
    scores = [(0.8, 0.9, 0.7), (0.81, 0.93, 0.74)]
    truth, logits = np.array([0, 1, 0, 1, 1]), np.eye(2)[[0, 1, 0, 1, 0]]
    for made, values in zip(sweeps, scores, strict=True):
        for number, (cell, value) in enumerate(zip(made.record.cells, values, strict=True)):
            run = made.dir.run(cell.name)
            end(run, "finished", value, next="end")
            write(run.predictions, "single-label", truth, logits, [f"text {number} {i}" for i in range(5)])
    comparison = compare([made.path for made in sweeps])
    (verdict,) = comparison.tests()
    assert verdict.paired is not None and verdict.paired.rows == 15 and verdict.run == sweeps[1].path.name
    assert compare_page.test_rows([verdict])[2] == [
        "Difference: run minus the first.",
        "The tests over folds cover sampling of rows, those of train too; all runs have one seed.",
    ]
    first = verdict.paired.differences[0]
    expected = paired_t_test(scores[1], scores[0], overlap=1 / 2)
    assert (first.metric, first.p, first.low) == ("accuracy", expected.p, expected.difference.low)
    assert (first.first, first.second) == (pytest.approx(0.8), pytest.approx(0.8266667))
    charts, page = collection_page(sweeps[0].path, [run.path for run in sweeps[0].runs], sweeps[0].path / "report")
    html = page(dict.fromkeys((chart.key for chart in charts), ""))
    assert "mean of 3 folds" in html and "Means over folds, the best first" in html and "Nadeau and Bengio" in html
    write(sweeps[1].dir.run("repeat=1,fold=2").predictions, "single-label", truth, logits, ["another text"] * 5)
    (verdict,) = compare([made.path for made in sweeps]).tests()
    assert verdict.paired is None and "the eval rows differ" in (verdict.why_not or "")
    (alone,) = compare([sweeps[0].path]).tests()
    assert "folds of one training" in (alone.why_not or "")


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--folds", "3", "--seeds", "2"], "cannot be combined with --grid, --search or --seeds"),
        (["--folds", "3", "--grid", GRID], "scored too kindly"),
        (["--folds", "3", "--search", "train.learning_rate=1e-6..1e-4:log"], "choose the setting first"),
        (["--repeats", "2", "--seeds", "2"], "--repeats: has no effect without --folds"),
        (["--folds", "3", "--set", "data.fold={of: 3, number: 1}"], "is also given by --set"),
    ],
)
def test_folds_of_more_than_one_setting_are_refused(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], scratch: Path, words: list[str], reason: str
) -> None:
    ran = command("sweep", str(recipe_file()), *words, env={"AFINA_SCRATCH": str(scratch)})
    assert ran.returncode == 2 and reason in ran.stderr, ran.stderr
    assert not list(scratch.glob("sweeps/*"))
