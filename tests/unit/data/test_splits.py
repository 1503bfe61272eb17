"""Splits, samples and labels on tables made here: rows chosen, tasks found, data refused, warnings."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.tiny import write_csv, write_jsonl

from afina.errors import AfinaError, DataError, RecipeError
from afina.recipe.keys.data_keys import Data
from afina.recipe.parse import parse_recipe
from afina.worker.data.labels.find_labels import Labels
from afina.worker.data.prepare import _RECIPE_FORMAT
from afina.worker.data.splits.build_splits import build_splits
from afina.worker.data.splits.choose_sources import choose_sources
from afina.worker.data.splits.divide import (
    sample_by_key,
    sample_rows,
    split_by_key,
    split_groups,
    stratified_split,
    value_groups,
)
from afina.worker.data.splits.groups import check_shared_groups, group_names
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

SHARES = [Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]


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


# -- sources ----------------------------------------------------------------------------------------------------------


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


# -- tasks and labels -------------------------------------------------------------------------------------------------


def both(rows: Rows) -> dict[str, Rows]:
    return {"train": rows, "eval": [{**r, "text": f"other {r['text']}"} for r in rows]}


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


def test_a_typo_that_became_a_class_is_named_with_its_rows(tmp_path: Path) -> None:
    rows = [
        {"text": f"t{i}", "label": "positve" if i % 100 == 7 else ["positive", "negative"][i % 2]} for i in range(600)
    ]
    warnings = build(tmp_path, both(rows))[2]
    expected = f"label 'positve' (12 rows: {tmp_path}/train.csv, rows 8, 108, 208, 308, 408 (and 1 more); {tmp_path}/eval.csv, rows"
    assert warnings[0].startswith(expected) and "is nearly 'positive' (600 rows)" in warnings[0], warnings
    assert len(warnings) == 1
    error = refused(tmp_path, both(rows), labels=["positive", "negative"])
    assert "label 'positve' is not one of" in error.message and "(6 such rows)" in error.message


@pytest.mark.parametrize(
    ("rare", "common"),
    [("grade 1", "grade 2"), ("yes", "yet"), ("male", "female"), ("negative", "positive"), ("A01", "A02")],
)
def test_other_labels_are_no_typos(tmp_path: Path, rare: str, common: str) -> None:
    rows = [{"text": f"t{i}", "label": rare if i % 20 == 3 else common if i % 3 else "something"} for i in range(120)]
    assert not any("nearly" in warning for warning in build(tmp_path, both(rows))[2])


def test_numbers_in_some_rows_and_words_in_others_are_named(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": ["bad", "good"][i % 2] if i < 20 else str(i % 2)} for i in range(30)]
    warnings = build(tmp_path, both(rows))[2]
    assert len(warnings) == 1 and warnings[0].startswith(
        f"labels are numbers in some rows and words in others: '0', '1' in 20 rows ({tmp_path}/train.csv, rows 21, 22, 23, 24, 25 "
    )
    assert f"'bad', 'good' in 40 rows ({tmp_path}/train.csv, rows 1, 2," in warnings[0]
    assert build(tmp_path, both(rows), labels=["bad", "good", "0", "1"])[2] == []


# -- checks -----------------------------------------------------------------------------------------------------------


def test_rows_without_text_or_label_are_named(tmp_path: Path) -> None:
    rows = reviews(30)
    for i in (3, 9, 12, 15, 18, 21):
        rows[i]["text"] = " \n"
    error = refused(tmp_path, both(reviews(9)) | {"train": rows})
    assert (
        f"train: 6 rows have an empty text (`text`): {tmp_path}/train.csv, rows 4, 10, 13, 16, 19 (and 1 more)"
        == error.message
    )
    rows = reviews(30)
    rows[7]["label"] = "  "
    assert "train: 1 rows have no label (`label`): " in refused(tmp_path, both(reviews(9)) | {"train": rows}).message
    jsonl = [{"text": "a", "label": "x"}, {"text": None, "label": "y"}, {"label": "x", "text": "b"}]
    assert "line 2" in refused(tmp_path, both(jsonl), kind="jsonl").message


def test_bad_rows_outside_the_sample_do_no_harm(tmp_path: Path) -> None:
    rows = reviews(60)
    used = set(sample_rows(60, 20, 42).tolist())
    spoilt = next(i for i in range(60) if i not in used)
    rows[spoilt] |= {"text": "", "label": ""}
    _, parts, _ = build(tmp_path, {"train": rows, "eval": reviews(9, start=90)}, train={"sample": 20})
    assert len(parts["train"]) == 20


def test_classes_that_cannot_be_learnt(tmp_path: Path) -> None:
    error = refused(tmp_path, {"train": reviews(6, "ab"), "eval": reviews(6, "abc", 50)})
    assert "train has no row with label 'c', eval has" in error.message
    assert "every row has the label 'a'" in refused(tmp_path, both(reviews(6, "a"))).message
    same = [{"text": f"t{i}", "label": "2.5"} for i in range(6)]
    assert "every label is 2.5" in refused(tmp_path, both(same)).message
    empty: Rows = [{"text": f"t{i}", "label": []} for i in range(6)]
    assert "no row has any label" in refused(tmp_path, both(empty), kind="jsonl").message


@pytest.mark.parametrize(
    ("train", "other", "meant"),
    [
        ("1.0 2.0", "1", "1.0"),
        ("Good bad", "good", "Good"),
        ("good bad", "goot", "good"),
        ("naïve bad", "nai\u0308ve", "naïve"),
    ],
)
def test_a_class_that_train_lacks_names_the_one_it_has(tmp_path: Path, train: str, other: str, meant: str) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(train.split() * 3)]
    error = refused(tmp_path, {"train": rows, "eval": [rows[1], {"text": "new", "label": other}]})
    assert f"train has no row with label {other!r}, eval has ({tmp_path}/eval.csv, row 2)" == error.message
    assert error.remedy.startswith(f"did you mean `{meant}`? train has ")


def test_a_split_that_gets_no_rows_says_of_what(tmp_path: Path) -> None:
    each = [{"text": f"t{i}", "label": f"id-{i}"} for i in range(30)]
    error = refused(tmp_path, {"all": each})
    assert f"{tmp_path}/all.csv: 30 rows, and as many labels (`label`)" in error.message
    error = refused(tmp_path, {"all": reviews(3, "ab")})
    assert "all.csv: 3 rows and 0.2 of them are asked for" in error.message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["1", "1.0", "2"],
            "labels that look alike are separate classes: '1' (PLACE, row 1; 4 in all), '1.0' (PLACE, row 2; 4 in all)",
        ),
        (
            ["Pos", "neg", "pos"],
            "labels that look alike are separate classes: 'Pos' (PLACE, row 1; 4 in all), 'pos' (PLACE, row 3; 4 in all)",
        ),
        (
            ["a", "b", "a\u200b"],
            "labels that look alike are separate classes: 'a' (PLACE, row 1; 4 in all), 'a\\u200b' (PLACE, row 3; 4 in all)",
        ),
        (["yes", "no", "NA"], "label 'NA' (PLACE, row 3) is text and a class"),
        (["yes", "no", "?"], "label '?' (PLACE, row 3) is text and a class"),
        (["a", "b", "a, b"], "label 'a, b' (PLACE, row 3) looks like several labels, but is one class: for several"),
        (["a", "a;c", "c;a"], "label 'a;c' (PLACE, row 2) looks like several labels, but is one class, as are 1 more"),
        (["['a']", "['a', 'b']", "[]"], "label \"['a', 'b']\" (PLACE, row 2) looks like a list written as text"),
        (["1,5", "2", "3,25"], "label '1,5' (PLACE, row 1) looks like a number with a decimal comma"),
    ],
)
def test_suspicious_labels_are_warned_of(tmp_path: Path, values: list[str], message: str) -> None:
    rows = [{"text": f"t{i}", "label": v} for i, v in enumerate(values * 2)]
    warnings = build(tmp_path, both(rows))[2]
    expected = message.replace("PLACE", f"{tmp_path}/train.csv")
    assert any(warning.startswith(expected) for warning in warnings), warnings
    assert not any(
        "alike" in w or "is text" in w or "several" in w for w in build(tmp_path, both(rows), labels=values)[2]
    )


@pytest.mark.parametrize("values", [["1", "nan", "2"], ["0.5", "1.5", "None"], ["1", "2", "N/A"], ["1", "inf", "2"]])
def test_a_missing_number_is_not_a_class(tmp_path: Path, values: list[str]) -> None:
    rows = [{"text": f"t{i}", "label": v} for i, v in enumerate(values * 2)]
    error = refused(tmp_path, both(rows))
    assert "among numbers" in error.message and f"{tmp_path}/train.csv, row " in error.message
    if "1.5" not in values:
        assert build(tmp_path, both(rows), labels=values)[0].names == tuple(values)


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


def test_rows_without_a_label_are_counted_over_all_splits(tmp_path: Path) -> None:
    rows = [{**row, "label": "" if row["n"] % 5 == 0 else row["label"]} for row in reviews(120)]
    shares = {"train": {"fraction": 0.8}, "eval": {"fraction": 0.2}}
    message = refused(tmp_path, {"all": rows}, **shares).message
    assert (
        message.startswith("train and eval: 24 rows have no label (`label`): ")
        and "rows 1, 6, 11, 16, 21 (and 19 more)" in message
    )


def test_labels_beyond_what_a_double_holds(tmp_path: Path) -> None:
    ids = (2**60 + 1, 2**60 + 3)
    rows = [{"text": f"t{n}", "label": ids[n % 2]} for n in range(6)]
    for kind in ("csv", "jsonl"):
        labels, _, warnings = build(tmp_path, both(rows), kind=kind)
        assert labels == Labels("single-label", tuple(map(str, ids))) and not any("look alike" in w for w in warnings)


def test_an_id_is_one_value(tmp_path: Path) -> None:
    rows = [{**row, "n": [1]} for row in reviews(6)]
    assert "column `n` holds a list, a text is expected" in refused(tmp_path, both(rows), kind="jsonl", id="n").message


def test_doubts_are_warnings(tmp_path: Path) -> None:
    train = [*reviews(20, "ab"), {"text": "only one", "label": "c", "n": 99}]
    evals = [{"text": "text 4", "label": "a", "n": 1}, {"text": "new", "label": "b", "n": 2}]
    _, _, warnings = build(tmp_path, {"train": train, "eval": evals}, labels=["a", "b", "c", "d"])
    message = "\n".join(warnings)
    assert f"label 'c' occurs once in train ({tmp_path}/train.csv, row 21)" in message
    assert "eval has no row with label 'c'" in message
    assert "no row with label 'd' in any split" in message
    assert len(warnings) == 3


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
