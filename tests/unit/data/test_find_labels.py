"""Tasks and labels as the data show them: text, JSON, lists, several columns, numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.data.built_splits import both, build, refused, reviews

from afina.worker.data.labels.find_labels import Labels

# -- tasks and labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, task, names",
    [
        (["1", "2", "10"], "single-label", ("1", "2", "10")),
        (["b", "a", "c"], "single-label", ("a", "b", "c")),
        (["1.0", "2.0", "10.0"], "single-label", ("1.0", "2.0", "10.0")),
        (["good, very", " bad ", "it's"], "single-label", ("bad", "good, very", "it's")),
        (["1", "2.5", "-3"], "regression", None),
        (["1", "2.5", "x"], "single-label", ("1", "2.5", "x")),
    ],
)
def test_the_task_that_csv_shows(tmp_path: Path, values: list[str], task: str, names: tuple[str, ...] | None) -> None:
    rows = [{"text": f"t{i}", "label": v} for i, v in enumerate(values * 2)]
    labels, parts, _ = build(tmp_path, both(rows))
    assert (labels.task, labels.names) == (task, names)
    if names:
        assert parts["train"].labels.tolist() == [names.index(v.strip()) for v in values * 2]
        assert parts["train"].labels.dtype == np.int64
    else:
        assert parts["train"].labels.tolist() == [float(v) for v in values * 2]
        assert parts["train"].labels.dtype == np.float32


@pytest.mark.parametrize(
    "values, task, names",
    [
        ([1, 2, 10], "single-label", ("1", "2", "10")),
        ([True, False], "single-label", ("false", "true")),
        ([0.5, 1, 2.25], "regression", None),
        ([1.0, 2.0], "single-label", ("1", "2")),
        ([["a", "b"], [], ["b"]], "multi-label", ("a", "b")),
    ],
)
def test_the_task_that_json_shows(tmp_path: Path, values: list[Any], task: str, names: tuple[str, ...] | None) -> None:
    rows = [{"text": f"t{i}", "label": v} for i, v in enumerate(values * 2)]
    labels, _, _ = build(tmp_path, both(rows), kind="jsonl")
    assert (labels.task, labels.names) == (task, names)


def test_the_order_that_the_recipe_gives_wins(tmp_path: Path) -> None:
    labels, parts, _ = build(tmp_path, both(reviews(6)), labels=["c", "a", "b"])
    assert labels.names == ("c", "a", "b")
    assert parts["train"].labels.tolist() == [1, 2, 0, 1, 2, 0]
    error = refused(tmp_path, both(reviews(6, "abC")), labels=["c", "a", "b"])
    assert "train.csv, row 3: label 'C' is not one of 'c', 'a', 'b' (2 such rows)" in error.message
    assert "did you mean `c`?" in error.remedy


def test_several_columns_of_0_and_1(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "x": ["0", "1", "true"][i % 3], "y, z": ["False", "0", "1"][i % 3]} for i in range(6)]
    labels, parts, _ = build(tmp_path, both(rows), label=["x", "y, z"])
    assert (labels.task, labels.names) == ("multi-label", ("x", "y, z"))
    assert parts["train"].labels.dtype == np.float32
    assert parts["train"].labels.tolist() == [[0, 0], [1, 0], [1, 1]] * 2
    rows[4]["x"] = "2"
    assert "train.csv, row 5: column `x` holds '2'" in refused(tmp_path, both(rows), label=["x", "y, z"]).message
    rows[4]["x"] = ""
    assert "2 rows have no label (`x`, `y, z`)" in refused(tmp_path, both(rows), label=["x", "y, z"]).message


def test_labels_in_one_cell(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": ["a; b", "", " c ;a;"][i % 3]} for i in range(6)]
    labels, parts, _ = build(tmp_path, both(rows), label_separator=";")
    assert labels.names == ("a", "b", "c")
    assert parts["train"].labels.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]] * 2
    error = refused(tmp_path, both(rows), label_separator=";", labels=["a", "b"])
    assert "train.csv, row 3: label 'c' is not one of 'a', 'b'" in error.message


def test_a_task_that_the_data_cannot_be(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": v} for i, v in enumerate(["1", "2", "three", "4"])]
    error = refused(tmp_path, both(rows), "regression")
    assert "train.csv, row 3: label 'three' is not a finite number" in error.message
    rows[2]["label"] = "inf"
    assert "row 3: label 'inf'" in refused(tmp_path, both(rows), "regression").message
    assert "holds single values" in refused(tmp_path, both(rows), "multi-label").message
    rows = [{**row, "more": "x"} for row in rows]
    lists = [{"text": "a", "label": ["x"]}, {"text": "b", "label": ["y", "z"]}]
    assert (
        "line 2: column `label` holds a list of 2 labels"
        in refused(tmp_path, both(lists), "single-label", kind="jsonl").message
    )
    assert "task single-label has one" in refused(tmp_path, both(rows), "single-label", label=["label", "more"]).message


def test_regression_is_divided_by_rank(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": f"{(i * 37 % 200) / 7:.3f}"} for i in range(200)]
    _, parts, _ = build(tmp_path, {"all": rows}, train={"fraction": 0.8}, eval={"fraction": 0.2})
    assert len(parts["eval"]) == 40
    counts = np.histogram(parts["eval"].labels, bins=np.quantile(parts["train"].labels, np.linspace(0, 1, 5)))[0]
    assert counts.min() >= 8, counts


# -- checks ------------------------------------------------------------------------------------------------------------


def test_lists_of_0_and_1_are_not_names(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": [i % 2, 1 - i % 2, 0]} for i in range(6)]
    error = refused(tmp_path, both(rows), kind="jsonl")
    assert "train.jsonl, line 1: column `label` holds 3 values of 0 and 1" in error.message
    rows[3]["label"] = [1]
    assert build(tmp_path, both(rows), kind="jsonl")[0].names == ("0", "1")


def test_a_separator_that_separates_nothing(tmp_path: Path) -> None:
    _, _, warnings = build(tmp_path, both(reviews(6)), label_separator="|")
    assert any("no label contains data.label_separator '|'" in warning for warning in warnings)


def test_lists_of_one_label_are_single_labels(tmp_path: Path) -> None:
    lists = [{"text": f"t{n}", "label": [["a"], ["b"], None][n % 3]} for n in range(6)]
    kept = [row for row in lists if row["label"]]
    for task in ("auto", "single-label"):
        labels, parts, warnings = build(tmp_path, both(kept), task, kind="jsonl")
        assert labels == Labels("single-label", ("a", "b")) and parts["train"].labels.tolist() == [0, 1] * 2
        assert any("`label` holds lists of one label each" in warning for warning in warnings)
    assert build(tmp_path, both(kept), "multi-label", kind="jsonl")[0].task == "multi-label"
    assert "4 rows have no label" in refused(tmp_path, both(lists), kind="jsonl").message
    numbers = [{"text": f"t{n}", "label": [n / 2]} for n in range(6)]
    labels, parts, _ = build(tmp_path, both(numbers), kind="jsonl")
    assert labels.task == "regression" and parts["train"].labels.tolist() == [n / 2 for n in range(6)]


def test_lists_of_one_label_beside_empty_ones_are_named(tmp_path: Path) -> None:
    lists = [{"text": f"t{n}", "label": [["a"], ["b"], []][n % 3]} for n in range(6)]
    labels, _, warnings = build(tmp_path, both(lists), kind="jsonl")
    assert labels.task == "multi-label"
    assert any("no row has more than one label" in w and "train.jsonl, lines 3, 6" in w for w in warnings), warnings
    lists[0]["label"] = ["a", "b"]
    for rows, task in ((lists, "auto"), (lists[1:], "multi-label")):
        assert not any(
            "no row has more than one label" in w for w in build(tmp_path, both(rows), task, kind="jsonl")[2]
        )


def test_numbers_of_two_kinds_are_one_label(tmp_path: Path) -> None:
    """In JSON 1 and 1.0 are one label, in lists and beside texts too; texts are compared as they are."""
    for values in ([1, 1.0, "1", "a"], [[1, "b"], [1.0], ["1"], ["a"]]):
        rows = [{"text": f"t{n}", "label": values[n % 4]} for n in range(8)]
        labels, _, _ = build(tmp_path, both(rows), kind="jsonl")
        assert set(labels.names or ()) == ({"1", "a"} if values[0] == 1 else {"1", "a", "b"})
    rows = [{"text": f"t{n}", "label": ["01", "1", "1.0", "1_0"][n % 4]} for n in range(8)]
    assert build(tmp_path, both(rows))[0].names == ("01", "1", "1.0", "1_0")


def test_numbers_that_are_written_as_text_are_named_where_each_occurs_once(tmp_path: Path) -> None:
    for write in ("{},5", "{} %", "€ {}"):
        rows = [{"text": f"t{n}", "label": write.format(n)} for n in range(40)]
        error = refused(tmp_path, {"all": rows}, train={"fraction": 0.8}, eval={"fraction": 0.2}, split_by="text")
        assert "as many labels" in error.message and "for a regression write plain numbers" in (error.remedy or "")


def test_labels_beyond_what_a_double_holds(tmp_path: Path) -> None:
    ids = (2**60 + 1, 2**60 + 3)
    rows = [{"text": f"t{n}", "label": ids[n % 2]} for n in range(6)]
    for kind in ("csv", "jsonl"):
        labels, _, warnings = build(tmp_path, both(rows), kind=kind)
        assert labels == Labels("single-label", tuple(map(str, ids))) and not any("look alike" in w for w in warnings)


def test_an_id_is_one_value(tmp_path: Path) -> None:
    rows = [{**row, "n": [1]} for row in reviews(6)]
    assert "column `n` holds a list, a text is expected" in refused(tmp_path, both(rows), kind="jsonl", id="n").message


def test_the_sizes_of_pairs_are_those_of_both_texts(tmp_path: Path) -> None:
    rows = [{"text": "same", "more": f"m{i}", "label": "ab"[i % 2]} for i in range(6)]
    others = [{**r, "more": f"other {i}"} for i, r in enumerate(rows)]
    _, parts, warnings = build(tmp_path, {"train": rows, "eval": others}, text=["text", "more"])
    assert warnings == []
    assert parts["train"].sizes.tolist() == [len(r["text"] + r["more"]) for r in rows]
    rows[3]["more"] = ""
    assert "empty text (`more`)" in refused(tmp_path, {"train": rows, "eval": others}, text=["text", "more"]).message


def test_ids_are_kept(tmp_path: Path) -> None:
    _, parts, _ = build(tmp_path, both(reviews(6)), id="n")
    assert parts["eval"].ids is not None and parts["eval"].ids.to_pylist() == [str(i) for i in range(6)]
