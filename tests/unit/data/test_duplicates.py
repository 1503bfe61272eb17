"""Rows that the model cannot tell apart, labels that one feature tells, and what these warnings spoil: the stage on tiny models."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import tiny_reviews, words, write_csv
from tests.unit.data.stage import prepare_here

from afina.run.plan import Plan
from afina.run.provenance.record import differences
from afina.worker.data.labels.find_labels import Labels
from afina.worker.data.labels.one_feature import check_one_feature
from afina.worker.data.prepared import Split, load_manifest, open_split
from afina.worker.data.splits.duplicates import TRAINED_ROWS, row_keys, trained_rows

Make = Callable[..., Plan]
Rows = list[dict[str, Any]]


@pytest.fixture
def prepared(plan: Make, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Prepares rows by split, and returns the stage's answer."""

    def make(files: dict[str, Rows], model: Path | None = None, **recipe: Any) -> dict[str, Any]:
        paths = {split: str(write_csv(tmp_path / f"{split}.csv", rows)) for split, rows in files.items()}
        test = {"test": {}} if "test" in files else {}
        return prepare_here(plan(model, data={"files": paths, **test, **recipe.pop("data", {})}, **recipe))

    return make


def spelt(rows: Rows) -> Rows:
    """The same for an uncased model."""
    return [{**row, "text": row["text"].upper().replace(" ", "  ")} for row in rows]


def test_every_pair_of_splits_is_compared_as_the_model_reads_it(prepared: Callable[..., dict[str, Any]]) -> None:
    rows = tiny_reviews(200, 1)
    answer = prepared(
        {"train": rows[:120], "eval": rows[120:160], "test": [*spelt(rows[:15]), *rows[140:160], *rows[160:]]}
    )
    pairs = [warning for warning in answer["warnings"] if "as the model reads them" in warning]
    assert [warning.split(", as")[0] for warning in pairs] == [
        "15 of 75 rows of test are in train too",
        "20 of 75 rows of test are in eval too",
    ]
    assert "test.csv, row 1 = " in pairs[0] and "train.csv, row 1;" in pairs[0]
    assert answer["spoiled"] == {"test": pairs}


def test_repeated_rows_of_eval_are_counted(prepared: Callable[..., dict[str, Any]]) -> None:
    rows = tiny_reviews(140, 2)
    answer = prepared({"train": rows[:120], "eval": [row for row in rows[120:] for _ in range(5)]})
    (warning,) = answer["spoiled"]["eval"]
    assert warning.startswith("80 of 100 rows of eval repeat an earlier one, as the model reads them")
    assert "intervals are too narrow" in warning and "eval.csv, row 2 = row 1;" in warning


def test_eval_and_test_that_are_asked_to_be_the_same_rows_are_said_once(
    prepared: Callable[..., dict[str, Any]],
) -> None:
    rows = tiny_reviews(140, 2)
    answer = prepared({"train": rows[:100], "eval": rows[100:]}, data={"test": {"split": "eval"}})
    assert [warning for warning in answer["warnings"] if "eval" in warning] == [
        "eval and test are the same rows: all of `eval`"
    ]


def test_equal_texts_with_other_labels(prepared: Callable[..., dict[str, Any]]) -> None:
    rows = tiny_reviews(140, 2)
    wrong = {**spelt(rows[:1])[0], "stars": 1 + rows[0]["stars"] % 5}
    answer = prepared({"train": [*rows[:100], wrong], "eval": rows[100:]})
    (warning,) = (warning for warning in answer["warnings"] if "different labels" in warning)
    assert warning.startswith("1 text of train occurs more than once with different labels: ")
    assert warning.endswith("train.csv, rows 1, 101")


def test_a_pair_is_the_same_only_if_both_texts_are(prepared: Callable[..., dict[str, Any]]) -> None:
    rows = [{**row, "more": word} for row, word in zip(tiny_reviews(60, 2), words(), strict=False)]
    others = [{**row, "more": f"{row['more']} today"} for row in rows]
    answer = prepared({"train": rows, "eval": others}, data={"text": ["text", "more"]})
    assert answer["spoiled"] == {}


# -- training on ------------------------------------------------------------------------------------------------------


def test_rows_that_the_base_models_run_was_trained_on(
    prepared: Callable[..., dict[str, Any]], models: Callable[..., Path], tmp_path: Path
) -> None:
    rows = tiny_reviews(200, 3)
    first = prepared({"train": rows[:100], "eval": rows[100:120]})
    run = tmp_path / "runs/first"
    shutil.copytree(models(), run / "model")
    with (run / f"{TRAINED_ROWS}").open("wb") as file:
        np.save(file, trained_rows(open_split(first["prepared"], "train"), models()))
    again = prepared({"train": rows[120:], "eval": spelt(rows[70:110])}, run / "model")
    (warning,) = again["spoiled"]["eval"]
    assert (
        warning
        == "30 of 40 rows of eval were trained on by the run that made the model (first), as the model reads them"
    )
    assert warning in again["warnings"]

    # The next run's record holds what both were trained on.
    second = tmp_path / "runs/second"
    shutil.copytree(run / "model", second / "model")
    with (second / TRAINED_ROWS).open("wb") as file:
        np.save(file, trained_rows(open_split(again["prepared"], "train"), run / "model"))
    third = prepared({"train": rows[:60], "eval": [*rows[60:70], *rows[190:]]}, second / "model")
    assert third["spoiled"]["eval"][0].startswith("20 of 20 rows of eval were trained on")


def test_a_run_without_that_record_is_looked_up_in_its_prepared_data(
    prepared: Callable[..., dict[str, Any]], models: Callable[..., Path], tmp_path: Path
) -> None:
    rows = tiny_reviews(140, 3)
    first = prepared({"train": rows[:100], "eval": rows[100:120]})
    run = tmp_path / "runs/old"
    shutil.copytree(models(), run / "model")
    (run / "plan.json").write_text("{}")
    (run / "prepared.json").write_text(json.dumps(first))
    again = prepared({"train": rows[110:], "eval": rows[90:110]}, run / "model")
    assert again["spoiled"]["eval"][0].startswith(
        "10 of 20 rows of eval were trained on by the run that made the model (old)"
    )
    shutil.rmtree(first["prepared"])
    assert prepared({"train": rows[111:], "eval": rows[90:110]}, run / "model")["spoiled"] == {}


def test_keys_follow_from_the_tokens_alone() -> None:
    one = row_keys(np.array([5, 6, 7, 5, 6], np.uint16), np.array([2, 1, 2]))
    other = row_keys(np.array([7, 5, 6], np.uint32), np.array([1, 2]))
    assert (one[0] == one[2]).all() and (one[0] == other[1]).all() and (one[1] == other[0]).all()
    assert len(np.unique(one, axis=0)) == 2 and row_keys(np.array([], np.uint16), np.array([], np.int64)).shape == (
        0,
        2,
    )


# -- one feature ------------------------------------------------------------------------------------------------------


def split_of(texts: list[list[int]], labels: list[int]) -> Split:
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    return Split(np.array([token for text in texts for token in text], np.uint16), offsets, np.array(labels))


LABELS = Labels("single-label", ("bad", "good", "so-so"))


def test_a_label_that_stands_in_the_text(prepared: Callable[..., dict[str, Any]]) -> None:
    names = ("awful", "okay", "excellent")
    rng = random.Random(1)
    rows = [
        {"text": " ".join([*rng.choices(words()[30:], k=8), names[i % 3]]), "stars": names[i % 3]} for i in range(240)
    ]
    answer = prepared({"train": rows[:200], "eval": rows[200:]})
    (warning,) = answer["spoiled"]["eval"]
    assert warning.startswith(
        "the text tells the label in train: 'awful' is in 67 of 67 rows with that label and in 0 others; "
    )
    assert warning in answer["warnings"]


def test_a_label_of_unknown_words_that_is_cut_from_some_rows(prepared: Callable[..., dict[str, Any]]) -> None:
    """Its name is many tokens, and long rows lose it."""
    names = ("gryx", "gryz")
    rng = random.Random(1)
    rows = [
        {
            "text": f"{' '.join(rng.choices(words()[30:], k=20 if i % 5 else 70))} [{names[i % 2].upper()}]",
            "stars": names[i % 2],
        }
        for i in range(240)
    ]
    answer = prepared({"train": rows[:200], "eval": rows[200:]})
    (warning,) = (each for each in answer["spoiled"]["eval"] if "tells the label" in each)
    assert "'gryx' is in 80 of 100 rows with that label and in 0 others" in warning


def test_some_tokens_in_a_row_that_tell_the_label() -> None:
    rng = np.random.default_rng(1)
    labels = [i % 3 for i in range(300)]
    marks = {0: [7, 8], 1: [8, 7], 2: [7, 7]}  # both tokens are in rows of all labels
    texts = [[2, *rng.integers(20, 60, 8), *marks[label], *rng.integers(20, 60, 4), 8] for label in labels]
    (warning,) = check_one_feature(LABELS, split_of(texts, labels), str, lambda text: [])
    assert "'7 8' is in 100 of 100 rows with 'bad' and in 0 others" in warning and "'8 7' is in 100 of" in warning


def test_words_that_only_hint_at_the_label_are_no_warning() -> None:
    rng = np.random.default_rng(1)
    labels = [i % 3 for i in range(300)]
    hint = [[2, *rng.integers(20, 60, 8), 10 + label if rng.random() < 0.8 else 13] for label in labels]
    assert check_one_feature(LABELS, split_of(hint, labels), str, lambda text: []) == []
    assert check_one_feature(LABELS, split_of(hint[:30], labels[:30]), str, lambda text: []) == []


def test_a_length_that_tells_the_label() -> None:
    rng = np.random.default_rng(1)
    labels = [i % 3 for i in range(300)]
    texts = [[2, *rng.integers(20, 60, 5 + 10 * label + int(rng.integers(4)))] for label in labels]
    (warning,) = check_one_feature(LABELS, split_of(texts, labels), str, lambda text: [])
    assert warning.startswith("the number of tokens tells the label of 100.0% of the rows of train")
    mixed = [[2, *rng.integers(20, 60, int(rng.integers(5, 40)))] for _ in labels]
    assert check_one_feature(LABELS, split_of(mixed, labels), str, lambda text: []) == []


# -- other remarks ----------------------------------------------------------------------------------------------------


def test_accuracy_that_chooses_where_one_class_is_nearly_all(prepared: Callable[..., dict[str, Any]]) -> None:
    rows = [{**row, "stars": "rare" if i % 16 == 0 else "usual"} for i, row in enumerate(tiny_reviews(240, 4))]
    files = {"train": rows[:160], "eval": rows[160:]}
    remarks = [warning for warning in prepared(files)["warnings"] if "accuracy" in warning]
    assert len(remarks) == 1
    assert remarks[0].startswith("93.8% of eval is 'usual': a model that always answers it has accuracy 0.938")
    assert not any("accuracy" in warning for warning in prepared(files, train={"best_metric": "f1"})["warnings"])


def test_the_manifest_counts_the_rows_of_each_file(prepared: Callable[..., dict[str, Any]]) -> None:
    rows = tiny_reviews(140, 2)
    answer = prepared({"train": rows[:100], "eval": rows[100:]})
    assert {name: about["rows"] for name, about in answer["files"].items()} == {"train.csv": 100, "eval.csv": 40}
    manifest = load_manifest(answer["prepared"])
    assert sorted(manifest["read"].values()) == [40, 100]


def test_files_of_one_name_are_recorded_apart(tmp_path: Path, plan: Callable[..., Plan]) -> None:
    rows = tiny_reviews(140, 2)
    for part, some in (("a/x", rows[:100]), ("b/x", rows[100:]), ("b/y", rows[:9])):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        write_csv(tmp_path / f"{part}.csv", some)
    files = {"train": [f"{tmp_path}/a/x.csv", f"{tmp_path}/b/y.csv"], "eval": f"{tmp_path}/b/x.csv"}
    answer = prepare_here(plan(data={"files": files}))
    assert {name: about["rows"] for name, about in answer["files"].items()} == {
        "a/x.csv": 100,
        "y.csv": 9,
        "b/x.csv": 40,
    }
    assert answer["files"]["a/x.csv"]["sha256"] != answer["files"]["b/x.csv"]["sha256"]


def test_a_record_names_the_data_files_that_changed_with_their_rows(prepared: Callable[..., dict[str, Any]]) -> None:
    rows = tiny_reviews(150, 2)
    first = {"train": rows[:100], "eval": rows[100:140]}
    grown = {"train": [*rows[:100], *rows[140:]], "eval": [*rows[100:139], {**rows[139], "text": "another one"}]}
    then, now, more = (
        {"data": {"read": prepared(files)["files"]}} for files in (first, grown, {**grown, "test": rows[90:100]})
    )
    assert differences(then, then) == []
    assert differences(then, now) == [
        "data file train.csv: 100 rows then, 110 now",
        "data file eval.csv: changed, 40 rows as before",
    ]
    assert differences(now, more) == ["data file test.csv: not used then"]
