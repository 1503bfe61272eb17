"""The column of sample weights: what is read, and what is refused with file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afina.errors import DataError
from afina.recipe.keys.data_keys import Data
from afina.worker.data.labels.loss_weights import row_weights
from afina.worker.data.splits.build_splits import build_splits
from afina.worker.data.tables.data_table import read_files


def _file(folder: Path, weights: list[Any]) -> Path:
    path = folder / "it's.jsonl"
    lines = [{"text": f"text {n}", "label": "ab"[n % 2], "w": weight} for n, weight in enumerate(weights)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 2, 0, 3], [1, 2, 0, 3]),
        ([0.5, 1, 1e9, 0], [0.5, 1, 1e9, 0]),
        (["1", " 2.5 ", "0", "1e-3"], [1, 2.5, 0, 1e-3]),
    ],
)
def test_weights_are_read(tmp_path: Path, weights: list[Any], expected: list[float]) -> None:
    table = read_files([_file(tmp_path, weights)], ["w", "label"], ["text"])
    found = row_weights("train", table, "w", np.array([3, 0, 2]))
    assert found.dtype == np.float32 and found.tolist() == pytest.approx([expected[3], expected[0], expected[2]])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -1, 1, 1], "train: `w` is not a weight .* in 1 row: .*it's.jsonl, line 2; the first holds -1"),
        ([1, None, 1, None], "in 2 rows: .*lines 2, 4"),
        ([1, "many", 1, 1], "holds 'many'"),
        ([1.0, float("nan"), 1.0, 1.0], "is not a weight"),
        (["1", "inf", "1", "1"], "holds 'inf'"),
        ([1, 1e300, 1, 1], "holds 1e"),
        ([True, False, True, True], "is not a weight"),
        ([[1], [2], [3], [4]], "holds lists, a weight is one number"),
        ([0, 0, 0, 0], "all weights in `w` are 0"),
    ],
)
def test_what_is_not_a_weight_is_refused(tmp_path: Path, weights: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        table = read_files([_file(tmp_path, weights)], ["w", "label"], ["text"])
        row_weights("train", table, "w", np.arange(4))
    assert caught.value.remedy


def test_each_part_has_the_weights_of_its_rows(tmp_path: Path) -> None:
    table = read_files([_file(tmp_path, [n / 10 + 1 for n in range(40)])], ["w", "label"], ["text"])
    data = Data.model_validate({"files": {"all": "x"}, "text": "text", "label": "label", "weight": "w"})
    _, splits = build_splits("auto", data, {"all": table}, {"train": "all", "eval": "all"}, [])
    for examples in splits.values():
        assert examples.weights is not None
        assert examples.weights.tolist() == pytest.approx((examples.rows / 10 + 1).tolist())


@pytest.mark.parametrize(("label", "ignored"), [("single", "'b'"), ("multi", "'c'")])
def test_a_label_whose_rows_all_weigh_nothing_is_named(tmp_path: Path, label: str, ignored: str) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"t {n}", "single": "ab"[n % 2], "multi": ["a", "bc"[n % 2]], "w": 1 - n % 2} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = read_files([path], ["w", label], ["text"])
    data = Data.model_validate({"files": {"train": "x", "eval": "x"}, "text": "text", "label": label, "weight": "w"})
    warnings: list[str] = []
    build_splits("auto", data, {"x": table}, {"train": "x", "eval": "x"}, warnings)
    expected = f"every row of train with label {ignored} has weight 0: nothing is learnt from it"
    assert expected in warnings, warnings
