"""Folds over prepared data: every row once, no group and no text in two folds, stratified, one store for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import tiny_reviews, write_csv, write_jsonl
from tests.unit.data.stage import prepare_here, refused_here

from afina.run.plan import Plan
from afina.worker.data import prepared
from afina.worker.data.splits.folds import open_rows, open_splits

Rows = list[dict[str, Any]]


def _fold(number: int, of: int = 5, repeat: int = 1, **data: Any) -> dict[str, Any]:
    return {"split_by": "text", **data, "fold": {"of": of, "number": number, "repeat": repeat}}


def _folds(
    made: Callable[..., Plan], of: int = 5, repeat: int = 1, **data: Any
) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """The answer of the last fold, and of each fold the splits and the rows."""
    splits, rows = [], []
    for number in range(1, of + 1):
        plan = made(data=_fold(number, of, repeat, **data))
        answer = prepare_here(plan) if number in (1, of) else answer  # noqa: F821
        folder = Path(answer["prepared"])
        manifest = prepared.load_manifest(folder)
        one, chosen = open_splits(folder, list(manifest["splits"]), manifest["task"], plan.recipe.data)
        splits.append(one)
        rows.append(chosen)
    assert answer["reused"]
    return answer, splits, rows


@pytest.mark.parametrize("kind", ["single", "several", "number", "groups"])
def test_every_row_is_in_one_fold_and_folds_are_stratified(
    plan: Callable[..., Plan], tmp_path: Path, kind: str
) -> None:
    rows: Rows = tiny_reviews(203, seed=5)
    for i, row in enumerate(rows):
        row |= {
            "author": f"author {i % 41}",
            "tags": [t for t, of in (("good", (4, 5)), ("end", (1, 5))) if row["stars"] in of],
        }
    rows[10]["text"] = rows[100]["text"].upper()
    label = {"several": "tags", "number": "rating"}.get(kind, "stars")
    data: dict[str, Any] = {"files": str(write_jsonl(tmp_path / "r.jsonl", rows)), "label": label}
    if kind == "groups":
        data["group"] = "author"
    answer, splits, chosen = _folds(plan, **data)
    together = np.concatenate([fold["eval"] for fold in chosen])
    assert sorted(together) == list(range(203))
    for one, fold in zip(splits, chosen, strict=True):
        assert sorted([*fold["train"], *fold["eval"]]) == list(range(203))
        assert abs(len(one["eval"]) - 203 / 5) <= (5 if kind == "groups" else 2)
        whole = np.concatenate([one["train"].labels, one["eval"].labels])
        if kind == "number":
            assert abs(float(np.mean(one["eval"].labels) - np.mean(whole))) < 0.15
        else:
            flags = whole if whole.ndim == 2 else np.eye(5)[whole]
            part = one["eval"].labels if whole.ndim == 2 else np.eye(5)[one["eval"].labels]
            assert (np.abs(part.sum(0) - flags.sum(0) / 5) <= (3 if kind == "groups" else 2)).all()
    assert answer["rows"] == {"train": len(splits[-1]["train"]), "eval": len(splits[-1]["eval"])}
    assert answer["tokens"]["eval"] == len(splits[-1]["eval"].tokens) == int(splits[-1]["eval"].offsets[-1])
    assert [fold["rows"] for fold in answer["folds"][0]] == [len(one["eval"]) for one in splits]
    in_fold = np.empty(203, int)
    for number, fold in enumerate(chosen):
        in_fold[fold["eval"]] = number
    if kind == "groups":
        assert [fold["groups"] for fold in answer["folds"][0]] == [
            len({i % 41 for i in fold["eval"]}) for fold in chosen
        ]
        assert sum(answer["groups"].values()) == 41
        assert all(len({in_fold[i] for i in range(author, 203, 41)}) == 1 for author in range(41))
    else:
        assert in_fold[10] == in_fold[100], "one text for the model"
    table = open_rows(Path(answer["prepared"]), "eval", chosen[2]).to_pydict()
    assert table["text"] == [rows[i]["text"] for i in chosen[2]["eval"]]
    assert table["row"] == [i + 1 for i in chosen[2]["eval"]]


def test_a_split_of_some_rows_has_their_tokens_labels_and_weights(plan: Callable[..., Plan]) -> None:
    folder = Path(prepare_here(plan())["prepared"])
    split = prepared.open_split(folder, "train")
    rows = np.array([5, 0, 17])
    some = split.take(rows)
    for at, row in enumerate(rows):
        assert (
            some.tokens[some.offsets[at] : some.offsets[at + 1]].tolist()
            == split.tokens[split.offsets[row] : split.offsets[row + 1]].tolist()
        )
    assert some.labels.tolist() == split.labels[rows].tolist() and len(some) == 3


def test_repeats_divide_anew_and_test_stays_apart(plan: Callable[..., Plan], tmp_path: Path) -> None:
    parts = {"train": {"fraction": 0.7}, "eval": {"fraction": 0.1}, "test": {"fraction": 0.2}}
    first, _, chosen = _folds(plan, 4, **parts)
    second, splits, again = _folds(plan, 4, 2, **parts)
    assert first["digest"] == second["digest"] and len(second["folds"]) == 2
    assert sum(fold["rows"] for fold in second["folds"][1]) == 120 - second["rows"]["test"]
    assert [fold["eval"].tolist() for fold in chosen] != [fold["eval"].tolist() for fold in again]
    assert list(splits[0]) == ["train", "eval", "test"] and len(splits[0]["test"]) == second["rows"]["test"] > 10


def test_folds_that_cannot_be_made_are_refused(plan: Callable[..., Plan], tmp_path: Path) -> None:
    rows = [{**row, "author": "a" if i < 30 else f"b{i % 3}"} for i, row in enumerate(tiny_reviews(60, seed=5))]
    files = str(write_csv(tmp_path / "r.csv", rows))
    error = refused_here(plan(data=_fold(1, 4, files=files, group="author")))
    assert "one of the groups (`author`) has 30 of 60 rows, more than one of 4 folds" in error
    assert "--folds 2 or fewer" in error
    error = refused_here(plan(data=_fold(1, 5, files=files, group="author")))
    assert "5 folds of 4 groups (`author`)" in error
    one = str(write_csv(tmp_path / "one.csv", [{**row, "author": "a"} for row in rows]))
    error = refused_here(plan(data=_fold(1, 5, files={"train": one, "eval": files}, group="author")))
    assert "folds of 1 groups (`author`)\nname another column" in error
    apart = {
        part: str(write_csv(tmp_path / f"{part}.csv", tiny_reviews(60, seed)))
        for part, seed in (("train", 1), ("eval", 2))
    }
    answer = prepare_here(plan(data=_fold(1, 5, files=apart)))
    assert any("the 60 of `eval` are not used" in line for line in answer["warnings"])
