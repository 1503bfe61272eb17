"""Groups: rows of one group stay together, however its name is written."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.unit.data.built_splits import SHARES, Rows, build, refused, reviews

from afina.worker.data.splits.divide import (
    split_groups,
)
from afina.worker.data.splits.groups import check_shared_groups, group_names


def test_a_group_stays_together(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2], "author": f"author {i // 6}"} for i in range(180)]
    shares = {"train": {"fraction": 0.6}, "eval": {"fraction": 0.3}, "test": {"fraction": 0.1}}
    _, parts, warnings = build(tmp_path, {"all": rows}, split_by="text", group="author", **shares)
    authors = {part: {(row - 1) // 6 for row in examples.table.row} for part, examples in parts.items()}
    assert [len(authors[part]) for part in ("train", "eval", "test")] == [18, 9, 3] and len(
        set.union(*authors.values())
    ) == 30
    assert warnings == [] and check_shared_groups("author", parts) == {}
    assert (
        "does not keep groups" in refused(tmp_path, {"all": rows}, split_by="order", group="author", **shares).message
    )
    _, parts, _ = build(tmp_path, {"train": rows[:90], "eval": rows[87:]}, group="author")
    assert check_shared_groups("author", parts) == {
        "eval": [
            "3 of 93 rows of eval belong to groups (`author`) that are in train too: 1 groups, the first 'author 14' "
            f"({tmp_path}/eval.csv, row 1)"
        ]
    }


def test_a_group_is_one_however_its_name_is_written(tmp_path: Path) -> None:
    column = pa.array(
        ["7", " 7.0", "+007", "7.", "-7", "70", "0.7", "Ann  Lee", "ann lee\u00a0", "Jose\u0301", "José", "０７"]
    )
    assert group_names(column).to_pylist() == [
        *["7"] * 4, "-7", "70", "0.7", *["ann lee"] * 2, *["josé"] * 2, "7",
    ]  # fmt: skip
    assert group_names(pa.array([7.0, 0.5, None, float("nan")])).to_pylist() == ["7", "0.5", None, None]
    shares = {"train": {"fraction": 0.5}, "eval": {"fraction": 0.5}}
    written = [str, lambda n: f"{n}.0", lambda n: f"{n:03d}"]
    rows = [{"text": f"text {i}", "label": "ab"[i % 2], "author": written[i % 3](i // 9)} for i in range(180)]
    _, parts, warnings = build(tmp_path, {"all": rows}, split_by="text", group="author", **shares)
    authors = [{(row - 1) // 9 for row in examples.table.row} for examples in parts.values()]
    assert [len(each) for each in authors] == [10, 10] and not authors[0] & authors[1]
    assert warnings == ["20 groups of `author` are written in several ways, as '0' and '0.0', and each is one group"]
    train = [{**row, "author": 1234567890123456789 + row["n"] // 3} for row in reviews(30)]
    evals = [{**row, "author": float(1234567890123456789)} for row in reviews(6, start=30)]
    _, _, warnings = build(tmp_path, {"train": train, "eval": evals}, kind="jsonl", group="author")
    assert [line for line in warnings if "rounded" in line] == [
        "6 rows have a group (`author`) that was rounded, as 1.2345678901234568e+18: rows of one group may be taken for several; "
        f"write that column as text: {tmp_path}/eval.jsonl, lines 1, 2, 3, 4, 5 (and 1 more)"
    ]


def test_rows_without_a_group_and_groups_that_cannot_be_held_are_named(tmp_path: Path) -> None:
    def of(sizes: list[int]) -> Rows:
        authors = [f"a{n}" for n, size in enumerate(sizes) for _ in range(size)]
        return [{"text": f"text {i}", "label": "ab"[i % 2], "author": author} for i, author in enumerate(authors)]

    rows = of([10] * 10)
    for i in (0, 1, 50, 99):
        rows[i]["author"] = ""
    for i in (2, 3, 4):
        rows[i]["author"] = "NA"
    rows[99]["text"] = rows[0]["text"].upper()
    own: dict[str, Any] = {"split_by": "text", "group": "author"}
    _, parts, warnings = build(tmp_path, {"all": rows}, **own)
    assert any("rows of train have no group (`author`); each counts as one of its own" in line for line in warnings)
    assert any(
        "3 rows of train have a word for a missing value as their group (`author`: na), and are one" in line
        for line in warnings
    )
    assert {99, 0} <= set(parts["train"].rows) or {99, 0} <= set(parts["eval"].rows), "equal texts stay together"
    error = refused(tmp_path, {"all": of([90, 5, 5])}, **own)
    assert "one group (`author`) has 90 of 100 rows, and the largest split holds 80" in error.message
    _, _, warnings = build(tmp_path, {"all": of([50, 50])}, **own)
    assert any("eval has 50.0% of the rows, 20.0% were asked for: groups" in line for line in warnings)
    assert (
        "no group (`author`) is left"
        in refused(
            tmp_path,
            {"all": of([60, 40])},
            **own,
            test={"fraction": 0.1},
            train={"fraction": 0.7},
            eval={"fraction": 0.2},
        ).message
    )
    assert "no row has a group" in refused(tmp_path, {"all": [{**row, "author": ""} for row in rows]}, **own).message
    _, _, warnings = build(tmp_path, {"all": of([1] * 100)}, **own)
    assert any("every row of train is a group of its own" in line for line in warnings)


@pytest.mark.parametrize("kind", ["single", "several", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_stratified_as_far_as_they_allow(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.unique(rng.zipf(1.7, 600) % 97 * 7 + rng.integers(0, 7, 600), return_inverse=True)[1]
    strata: Any = rng.choice(4, 600, p=[0.6, 0.25, 0.1, 0.05])
    if kind == "several":
        strata = rng.random((600, 4)) < [0.5, 0.2, 0.1, 0.04]
    parts = split_groups(groups, None if kind == "none" else strata, SHARES, seed)
    assert sorted(np.concatenate(parts)) == list(range(600))
    assert sum(len(set(groups[part])) for part in parts) == len(set(groups))
    largest = np.bincount(groups).max()
    flags = (
        np.ones((600, 1), bool) if kind == "none" else strata if kind == "several" else np.eye(4, dtype=bool)[strata]
    )
    for share, part in zip(SHARES, parts, strict=True):
        assert abs(len(part) - float(share) * 600) <= max(3, 0.2 * largest), f"seed {seed}"
        off = np.abs(flags[part].sum(0) - float(share) * flags.sum(0))
        assert (off <= max(3, 0.2 * largest)).all(), f"seed {seed}: {off}"
    assert [part.tolist() for part in split_groups(groups, strata, SHARES, seed)] == [
        part.tolist() for part in split_groups(groups, strata, SHARES, seed)
    ]


def test_rows_alone_are_stratified_to_one_row() -> None:
    """Groups of one row: a stratified division, also by several labels, which a random one misses by far more."""
    fifths = [Fraction(1, 5)] * 5
    rng = np.random.default_rng(3)
    strata = rng.choice(3, 1003, p=[0.7, 0.25, 0.05])
    for part in split_groups(np.arange(1003), strata, fifths, 0):
        assert abs(len(part) - 1003 / 5) <= 2
        assert (np.abs(np.bincount(strata[part]) - np.bincount(strata) / 5) < 1.5).all()
    flags = rng.random((1003, 6)) < [0.5, 0.3, 0.2, 0.1, 0.03, 0.01]
    off = [
        np.abs(flags[part].sum(0) - flags.sum(0) / 5).max() for part in split_groups(np.arange(1003), flags, fifths, 0)
    ]
    random = [np.abs(flags[part].sum(0) - flags.sum(0) / 5).max() for part in np.array_split(rng.permutation(1003), 5)]
    assert max(off) <= 3 < max(random), (off, random)
    # Written down, so that another platform or NumPy that divides differently is noticed.
    assert split_groups(np.arange(20) // 2, np.arange(20) % 3, fifths, 42)[1].tolist() == [6, 7, 10, 11]
