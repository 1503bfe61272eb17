"""Which source a split is of: files, splits of the Hub, a column; fractions and samples of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import write_csv
from tests.unit.data.built_splits import build, refused, reviews

from afina.errors import DataError, RecipeError
from afina.recipe.keys.data_keys import Data
from afina.worker.data.splits.build_splits import build_splits
from afina.worker.data.splits.choose_sources import choose_sources
from afina.worker.data.tables.data_table import read_files

# -- a split as a function of the row ----------------------------------------------------------------------------------


def test_a_column_names_the_split_of_each_row(tmp_path: Path) -> None:
    names = ["train", "TRAIN", "train", "validation", "test"]
    rows = [{**row, "split": names[i % 5]} for i, row in enumerate(reviews(60, "ab"))]
    _, parts, warnings = build(tmp_path, {"all": rows}, split_column="split")
    assert parts["train"].table.row.tolist() == [i + 1 for i in range(60) if i % 5 < 3]
    assert parts["eval"].table.row.tolist() == [i + 1 for i in range(60) if i % 5 == 3]
    assert warnings == ["12 rows whose `split` is 'test' are in no split: add `test: {}` to `data` to use them"]
    _, parts, _ = build(tmp_path, {"all": rows}, split_column="split", test={}, eval={"split": "test"})
    assert (
        parts["eval"].table.row.tolist() == parts["test"].table.row.tolist() == [i + 1 for i in range(60) if i % 5 == 4]
    )
    shares = {"train": {"fraction": 0.5}, "eval": {"split": "train", "fraction": 0.5}, "split_by": "text"}
    _, parts, _ = build(tmp_path, {"all": rows}, split_column="split", **shares)
    assert len(parts["train"]) + len(parts["eval"]) == 36


def test_a_column_that_does_not_name_splits_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "split": f"part {i}"} for i, row in enumerate(reviews(60))]
    assert "has 60 different values" in refused(tmp_path, {"all": rows}, split_column="split").message
    rows = [{**row, "split": "train" if i % 2 else ""} for i, row in enumerate(reviews(60))]
    assert "30 rows have no split (`split`): " in refused(tmp_path, {"all": rows}, split_column="split").message
    rows = [{**row, "split": "ab"[i % 2]} for i, row in enumerate(reviews(60))]
    assert "no source for this split; there are: a, b" in refused(tmp_path, {"all": rows}, split_column="split").message
    rows = [{**row, "split": "train"} for row in reviews(60)]
    error = refused(tmp_path, {"all": rows}, split_column="split", eval={"split": "dev"})
    assert "data.eval.split: `dev` is not a value of column `split`" in error.message


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "known, data, chosen",
    [
        (["all"], {}, {"train": "all", "eval": "all"}),
        (["train", "eval"], {}, {"train": "train", "eval": "eval"}),
        (["train"], {}, {"train": "train", "eval": "train"}),
        (["all", "test"], {"test": {}}, {"train": "all", "eval": "all", "test": "test"}),
        (["train", "test"], {"eval": {"split": "test"}}, {"train": "train", "eval": "test"}),
    ],
)
def test_sources_of_files(known: list[str], data: dict[str, Any], chosen: dict[str, str]) -> None:
    spec = Data.model_validate({"files": dict.fromkeys(known, "x.csv"), "text": "t", "label": "l", **data})
    assert choose_sources(spec, known, []) == chosen


@pytest.mark.parametrize(
    "known, data, chosen",
    [
        (["train", "validation", "test"], {}, {"train": "train", "eval": "validation"}),
        (["train", "dev"], {"test": {"split": "dev"}}, {"train": "train", "eval": "dev", "test": "dev"}),
        (["train", "test"], {}, {"train": "train", "eval": "test"}),
        (["tr", "va"], {"splits": {"train": "tr", "eval": "va"}}, {"train": "tr", "eval": "va"}),
        (["train"], {}, {"train": "train", "eval": "train"}),
    ],
)
def test_sources_of_hub_splits(known: list[str], data: dict[str, Any], chosen: dict[str, str]) -> None:
    warnings: list[str] = []
    spec = Data.model_validate({"hub": "me/x", "text": "t", "label": "l", **data})
    assert choose_sources(spec, known, warnings) == chosen
    assert bool(warnings) == (chosen["eval"] == "test")


def test_unknown_splits_are_refused_with_the_nearest() -> None:
    spec = Data.model_validate({"hub": "me/x", "text": "t", "label": "l", "eval": {"split": "vaildation"}})
    with pytest.raises(RecipeError) as error:
        choose_sources(spec, ["train", "validation"], [])
    assert error.value.remedy == "did you mean `validation`? known: train, validation"
    spec = Data.model_validate({"hub": "me/x", "text": "t", "label": "l", "splits": {"eval": "tset"}})
    with pytest.raises(RecipeError, match=r"data\.splits\.eval: `tset` is not a split of me/x"):
        choose_sources(spec, ["train", "test"], [])


def test_one_source_without_fractions_is_divided_with_a_warning(tmp_path: Path) -> None:
    _, parts, warnings = build(tmp_path, {"all": reviews(100)})
    assert {p: len(e) for p, e in parts.items()} == {"train": 80, "eval": 20}
    assert any("0.8 for train, 0.2 for eval" in w for w in warnings)


def test_a_split_without_fraction_gets_the_rest(tmp_path: Path) -> None:
    _, parts, warnings = build(tmp_path, {"all": reviews(120)}, train={"fraction": 0.75})
    assert {p: len(e) for p, e in parts.items()} == {"train": 90, "eval": 30}
    assert any("eval gets the rest" in w for w in warnings)
    assert "would get no rows" in refused(tmp_path, {"all": reviews(120)}, train={"fraction": 1.0}).message
    assert "how much does each get" in refused(tmp_path, {"all": reviews(120)}, test={}).message


def test_a_sample_larger_than_the_split_says_how_many_there_are(tmp_path: Path) -> None:
    error = refused(tmp_path, {"train": reviews(30), "eval": reviews(9, start=50)}, eval={"sample": 10})
    assert "data.eval.sample: 10 rows are asked for, 9 exist" in error.message


def test_a_source_without_rows(tmp_path: Path) -> None:
    (tmp_path / "eval.csv").write_text("text,label\n")
    spec = {"train": reviews(30)}
    write_csv(tmp_path / "train.csv", spec["train"])
    data = Data.model_validate(
        {"files": {p: str(tmp_path / f"{p}.csv") for p in ("train", "eval")}, "text": "text", "label": "label"}
    )
    tables = {p: read_files([tmp_path / f"{p}.csv"], ["label"], ["text"]) for p in ("train", "eval")}
    with pytest.raises(DataError, match=r"eval\.csv: no rows"):
        build_splits("auto", data, tables, {"train": "train", "eval": "eval"}, [])
