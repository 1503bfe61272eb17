"""Splits and samples: rows are divided as they should, by the row alone, and added ones move no other."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import write_csv
from tests.unit.data.built_splits import SHARES, build, reviews

from afina.recipe.keys.data_keys import Data
from afina.recipe.parse import parse_recipe
from afina.worker.data.prepare import _RECIPE_FORMAT
from afina.worker.data.splits.build_splits import build_splits
from afina.worker.data.splits.choose_sources import choose_sources
from afina.worker.data.splits.divide import (
    sample_by_key,
    sample_rows,
    split_by_key,
    stratified_split,
    value_groups,
)
from afina.worker.data.tables.data_table import read_files

# -- splits and samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_split_is_disjoint_stratified_and_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(50, 400))
    strata = rng.choice(6, n, p=[0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    shares = [Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]
    pieces = stratified_split(strata, n, shares, seed)
    together = np.concatenate(pieces)
    assert len(np.unique(together)) == len(together) == n, f"seed {seed}"
    for share, piece in zip(shares, pieces, strict=True):
        assert (np.diff(piece) > 0).all(), "source order"
        assert abs(len(piece) - share * n) <= 3, f"seed {seed}"
        for stratum in range(6):
            size = (strata == stratum).sum()
            if size > 1:
                assert abs((strata[piece] == stratum).sum() - share * size) < 2, f"seed {seed}, stratum {stratum}"
    assert set(strata) == set(strata[pieces[0]]), "every stratum is in the first part"


def test_shares_may_leave_rows_out() -> None:
    pieces = stratified_split(None, 1000, [Fraction("0.5"), Fraction("0.25")], 1)
    assert [len(p) for p in pieces] == [500, 250]
    assert not set(pieces[0]) & set(pieces[1])


def test_a_split_depends_on_the_seed_alone() -> None:
    strata = np.arange(100) % 3
    halves = [Fraction("0.5"), Fraction("0.5")]
    assert stratified_split(strata, 100, halves, 7)[0].tolist() == stratified_split(strata, 100, halves, 7)[0].tolist()
    assert stratified_split(strata, 100, halves, 7)[0].tolist() != stratified_split(strata, 100, halves, 8)[0].tolist()
    # Written down, so that another platform or NumPy that cuts differently is noticed.
    assert stratified_split(strata[:20], 20, halves, 42)[0].tolist() == [5, 6, 7, 9, 10, 11, 12, 14, 15, 19]


@pytest.mark.parametrize("n, sample, seed", [(10, 10, 42), (3708, 600, 42), (1000, 1, 0), (257, 100, 2**32 - 1)])
def test_a_sample_is_the_one_that_datasets_takes(n: int, sample: int, seed: int) -> None:
    datasets = pytest.importorskip("datasets")
    theirs = datasets.Dataset.from_dict({"i": list(range(n))}).shuffle(seed=seed).select(range(sample))
    assert sample_rows(n, sample, seed).tolist() == theirs["i"][:]


def test_a_sample_of_a_split_is_in_shuffled_order_and_all_rows_in_source_order(tmp_path: Path) -> None:
    rows = reviews(90)
    parts = {"train": {"fraction": 0.5, "sample": 20, "seed": 3}, "eval": {"fraction": 0.5}}
    _, examples, _ = build(tmp_path, {"all": rows}, **parts)
    taken = stratified_split(np.arange(90) % 3, 90, [Fraction("0.5"), Fraction("0.5")], 3)
    assert (examples["train"].table.row - 1).tolist() == taken[0][
        np.random.default_rng(3).permutation(45)[:20]
    ].tolist()
    assert (examples["eval"].table.row - 1).tolist() == taken[1].tolist()


# -- a split as a function of the row ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_rows_that_are_added_move_no_other_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**63, (900, 2)).astype(np.uint64)
    strata = rng.choice(3, 900, p=[0.5, 0.3, 0.2])
    before, after = (split_by_key(keys[:count], strata[:count], SHARES, seed) for count in (600, 900))
    for few, more in zip(before, after, strict=True):
        assert set(more[more < 600]) == set(few), f"seed {seed}"
    order = rng.permutation(900)
    shuffled = split_by_key(keys[order], strata[order], SHARES, seed)
    assert [set(order[part]) for part in shuffled] == [set(part) for part in after]
    for share, part in zip(SHARES, after, strict=True):
        spread = 4 * (900 * float(share) * (1 - float(share))) ** 0.5
        assert abs(len(part) - float(share) * 900) < spread, f"seed {seed}"
    assert set(strata) == set(strata[after[0]])


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_changes_only_by_its_share_of_the_rows_that_are_added(seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 2**63, (1200, 2)).astype(np.uint64)
    few, more = (sample_by_key(keys[:count], 100, seed) for count in (1000, 1200))
    new = int((more >= 1000).sum())
    assert len(few) == len(more) == 100 and set(more[more < 1000]) <= set(few)
    assert len(set(few) - set(more)) == new and new < 40, f"seed {seed}"
    # Independent of the split by the same seed: no share of it is preferred.
    low = np.isin(sample_by_key(keys, 600, seed), split_by_key(keys, None, [Fraction("0.5")], seed)[0]).mean()
    assert 0.4 < low < 0.6, f"seed {seed}"


def test_a_sample_follows_the_texts_but_for_a_whole_split_of_the_hub(tmp_path: Path) -> None:
    parts: dict[str, Any] = {"train": {"fraction": 0.8, "sample": 30}, "eval": {"fraction": 0.2}, "split_by": "text"}
    texts = []
    for rows in (reviews(200), reviews(200)[::-1] + reviews(4, start=200)):
        _, examples, _ = build(tmp_path, {"all": rows}, **parts)
        texts.append({rows[i]["text"] for i in examples["train"].rows})
    assert len(texts[0] & texts[1]) >= 28
    own: dict[str, Any] = {"train": {"sample": 30}, "split_by": "text"}
    _, examples, _ = build(tmp_path, {"train": reviews(90), "eval": reviews(30, start=90)}, **own)
    assert examples["train"].rows.tolist() != sample_rows(90, 30, 42).tolist()
    table = read_files([write_csv(tmp_path / "hub.csv", reviews(90))], ["label"], ["text"])
    spec = Data.model_validate({"hub": "me/x", "text": "text", "label": "label", **own})
    _, examples = build_splits("auto", spec, {"h": table, "e": table}, {"train": "h", "eval": "e"}, [])
    assert examples["train"].rows.tolist() == sample_rows(90, 30, 42).tolist()


def test_splits_of_the_hub_that_share_one_are_divided_by_text(tmp_path: Path) -> None:
    data = parse_recipe("{name: x, model: m, data: {hub: me/x, text: text, label: label}}").data
    assignments = []
    for count in (200, 260):
        table = read_files([write_csv(tmp_path / "hub.csv", reviews(count))], ["label"], ["text"])
        sources = choose_sources(data, ["train"], [])
        assignments.append(build_splits("auto", data, {"train": table}, sources, [])[1]["eval"].rows)
    assert set(assignments[1][assignments[1] < 200]) == set(assignments[0])


def test_a_regression_keeps_a_row_of_each_tenth_of_its_numbers_in_every_split() -> None:
    values = np.random.default_rng(0).lognormal(size=100).round(1)
    groups = value_groups(values)
    assert len(set(groups)) == 10 and all(len(set(groups[values == value])) == 1 for value in values)
    assert (np.diff(groups[np.argsort(values)]) >= 0).all()
    assert value_groups(np.array([1.0, np.nan, np.inf, 1.0])).tolist() == [0, 0, 0, 0]
    groups = value_groups(np.random.default_rng(0).permutation(100) / 7)
    for seed in range(20):
        keys = np.random.default_rng(seed).integers(0, 2**63, (100, 2)).astype(np.uint64)
        for part in split_by_key(keys, groups, SHARES, seed):
            assert set(groups[part]) == set(range(10)), f"seed {seed}"


def test_the_format_number_changes_with_the_meaning_of_inputs(tmp_path: Path) -> None:
    """Prepared data are found again by a digest of their inputs and this number: where the digest below changes, raise
    `_RECIPE_FORMAT`, and write the new pair here."""
    halves: dict[str, Any] = {"train": {"fraction": 0.6}, "eval": {"fraction": 0.3, "sample": 5}}
    numbers = [{"text": f"t{i}", "label": i * 37 % 11 / 4} for i in range(60)]
    mixed = [{"text": f"t{i}", "label": [1, 1.0, "1", True, "b "][i % 5]} for i in range(60)]
    lists = [{"text": f"t{i}", "label": [["a"], ["b"]][i % 2]} for i in range(60)]
    many = [{"text": f"t{i}", "label": [["a", 2], [], ["b", 2.0]][i % 3]} for i in range(60)]
    digest = hashlib.sha256()
    for rows in (reviews(60), numbers, mixed, lists, many):
        for split_by in ("text", "order"):
            labels, parts, _ = build(tmp_path, {"all": rows}, kind="jsonl", split_by=split_by, **halves)
            taken = {part: [e.rows.tolist(), e.labels.tolist()] for part, e in parts.items()}
            digest.update(json.dumps([labels.task, labels.names, taken]).encode())
    assert (_RECIPE_FORMAT, digest.hexdigest()[:16]) == (2, "862571fb16fa007d")


def test_equal_keys_stay_together_and_the_seed_decides() -> None:
    keys = np.repeat(np.arange(200, dtype=np.uint64), 3).reshape(-1, 1)
    parts = split_by_key(keys, None, SHARES, 1)
    assert sum(len(set(keys[part, 0])) for part in parts) == 200
    assert [part.tolist() for part in parts] != [part.tolist() for part in split_by_key(keys, None, SHARES, 2)]
    # Written down, so that another platform or NumPy that divides differently is noticed.
    assert split_by_key(np.arange(20, dtype=np.uint64).reshape(-1, 1), None, SHARES, 42)[1].tolist() == [
        0,
        1,
        4,
        13,
        15,
    ]


def test_small_data_give_every_label_to_train_and_every_split_a_row() -> None:
    for seed in range(50):
        keys = np.random.default_rng(seed).integers(0, 2**63, (12, 2)).astype(np.uint64)
        strata = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3])
        parts = split_by_key(keys, strata, [Fraction("0.8"), Fraction("0.2")], seed)
        assert len(parts[0]) + len(parts[1]) == 12 and len(parts[1]), f"seed {seed}"
        assert set(strata[parts[0]]) == {0, 1, 2, 3}, f"seed {seed}"


def test_a_text_in_two_spellings_is_in_one_split(tmp_path: Path) -> None:
    rows = [
        row
        for i in range(60)
        for row in ({"text": f"Text {i}", "label": "ab"[i % 2]}, {"text": f" text  {i}", "label": "ab"[i % 2]})
    ]
    _, parts, _ = build(tmp_path, {"all": rows}, split_by="text", train={"fraction": 0.5}, eval={"fraction": 0.5})
    assert {(row - 1) // 2 for row in parts["train"].table.row} & {
        (row - 1) // 2 for row in parts["eval"].table.row
    } == set()
    assert len(parts["train"]) + len(parts["eval"]) == 120
