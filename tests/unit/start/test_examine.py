"""What `afina init` says about the data: all that prefetch would refuse or warn of."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.unit.start.conftest import Init, reviews

from afina.recipe.schema import Recipe


def test_what_prefetch_would_refuse_is_said_with_its_rows(init: Init, tmp_path: Path, model: Path) -> None:
    rows = reviews(40)
    rows[4]["text"], rows[6]["text"], rows[9]["stars"] = "", "  ", ""
    rows[11]["text"] = rows[10]["text"]
    answer = init(
        tmp_path / "p", "--data", tiny.write_csv(tmp_path / "r.csv", rows), "--label", "stars", "--model", model
    )
    assert len(answer["warnings"]) == 2
    assert "2 rows have an empty text (rows 5, 7)" in answer["warnings"][0]
    assert "1 row has no label (row 10)" in answer["warnings"][1]
    assert "1 text occurs more than once" in answer["text"]


@pytest.mark.parametrize(
    ("labels", "counts", "refused"),
    [
        (["01", "1"], {"01": 6, "1": 6}, ""),
        ([2**60 + 1, 2**60 + 3], {str(2**60 + 1): 6, str(2**60 + 3): 6}, ""),
        ([1, 1.0, "x"], {"1": 8, "x": 4}, ""),
        (["1_0", "20"], {"1_0": 6, "20": 6}, ""),
        ([0.5, "nan", 1.5], {}, "4 rows have a label that is no finite number, among numbers (rows 2, 5, 8, 11)"),
        ([["a"], "b", "c"], None, "4 rows have a list as label, where others have a single value (rows 1, 4, 7, 10)"),
        ([["a"], [["b"]], ["c"]], None, "4 rows have a label that is an object or holds one (rows 2, 5, 8, 11)"),
    ],
)
def test_labels_are_those_that_prefetch_takes(
    init: Init, tmp_path: Path, model: Path, labels: list[Any], counts: dict[str, int] | None, refused: str
) -> None:
    rows = [{"text": f"it was good {n}", "label": labels[n % len(labels)]} for n in range(12)]
    path = tiny.write_jsonl(tmp_path / "r.jsonl", rows)
    answer = init(tmp_path / "p", "--data", path, "--label", "label", "--model", model)
    assert counts is None or answer["labels"] == counts
    assert refused in " ".join(answer["warnings"]) and bool(answer["warnings"]) == bool(refused)


@pytest.mark.parametrize(
    ("columns", "warning"),
    [
        (lambda n: {"label": "good"}, "every row has the label 'good': afina prefetch refuses that"),
        (lambda n: {"label": [n % 2, 1]}, "`label` holds lists of 0 and 1: afina prefetch refuses that"),
        (lambda n: {"label": n % 2, "it's b": 1.0, "c": n}, "`label` holds 0 and 1, as `it's b` does: for several labels a "
         "row `label: [label, \"it's b\"]`"),
        (lambda n: {"label": n % 2, "b": n % 3}, ""),
        (lambda n: {"label": n % 3, "b": n % 2}, ""),
    ],
)  # fmt: skip
def test_labels_of_another_kind_than_proposed_are_said(
    init: Init, tmp_path: Path, model: Path, columns: Callable[[int], dict[str, Any]], warning: str
) -> None:
    rows = [{"text": f"it was good {n}", **columns(n)} for n in range(12)]
    path = tiny.write_jsonl(tmp_path / "r.jsonl", rows)
    answer = init(tmp_path / "p", "--data", path, "--label", "label", "--model", model)
    assert [w[: len(warning)] for w in answer["warnings"]] == ([warning] if warning else [])


def test_problems_of_all_splits_are_shown(init: Init, tmp_path: Path, model: Path) -> None:
    data = tmp_path / "d"
    data.mkdir()
    rows = reviews(40)
    tiny.write_csv(data / "train.csv", rows)
    tiny.write_csv(data / "test.csv", [{**row, "text": f"new {row['text']}", "stars": ""} for row in rows[:7]])
    lines = ["text\tstars", '"It was good\t4', 'so "it" was\t5', 'bad"\t1', *(f"new one {n}\t1" for n in range(9))]
    (data / "eval.tsv").write_text("\n".join(lines[:2] + lines[3:]))
    answer = init(tmp_path / "p", "--data", data, "--label", "stars", "--model", model)
    assert "test: 7 rows have no label (rows 1, 2, 3, 4, 5, …)" in " ".join(answer["warnings"])
    assert "eval.tsv, row 1: spans lines, because of a quote" in " ".join(answer["warnings"])


@pytest.mark.parametrize("words", [450, 1500])
def test_uneven_classes_long_texts_and_parts_that_share_texts(init: Init, tmp_path: Path, words: int) -> None:
    rng = random.Random(1)
    rows = [
        {"text": f"{n} " + " ".join(["word"] * rng.randint(100, words)), "label": "rare" if n % 10 == 0 else "usual"}
        for n in range(300)
    ]
    data = tmp_path / "d"
    data.mkdir()
    tiny.write_csv(data / "train.csv", rows)
    tiny.write_csv(data / "dev.csv", rows[:20])
    answer = init(tmp_path / "p", "--data", data)
    recipe: Recipe = answer["recipe"]
    assert recipe.metrics is not None and (recipe.metrics[0], recipe.train.best_metric) == ("f1", "f1")
    assert "9.0 times the rows of the smallest" in answer["text"]
    assert recipe.tokens.max_length == 512
    if words == 450:
        assert recipe.tokens.truncation == "head+tail" and "of the texts will be cut at 512" in answer["text"]
    else:  # up to 1,880 tokens, 382 more with each window
        assert recipe.tokens.windows is not None and (
            recipe.tokens.windows.max_windows,
            recipe.train.max_batch_per_device,
        ) == (5, 1)
        assert "of the texts are longer than a window of 512" in answer["text"]
    assert any("20 texts of the other splits are in train too" in w for w in answer["warnings"])
    assert recipe.model == "google-bert/bert-base-cased" and recipe.train.epochs == 5
