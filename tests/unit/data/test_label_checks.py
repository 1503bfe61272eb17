"""Labels and texts that are refused or warned of: rows without one, classes that cannot be learnt, typos."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.data.built_splits import Rows, both, build, refused, reviews

from afina.worker.data.splits.divide import (
    sample_rows,
)

# -- tasks and labels --------------------------------------------------------------------------------------------------


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


# -- checks ------------------------------------------------------------------------------------------------------------


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
    assert "train: 1 row has no label (`label`): " in refused(tmp_path, both(reviews(9)) | {"train": rows}).message
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
        (["1", "1.0", "2"], "labels that look alike are separate classes: '1' (PLACE, row 1; 4 in all), '1.0' (PLACE, row 2; 4 in all)"),
        (["Pos", "neg", "pos"], "labels that look alike are separate classes: 'Pos' (PLACE, row 1; 4 in all), 'pos' (PLACE, row 3; 4 in all)"),
        (["a", "b", "a\u200b"], "labels that look alike are separate classes: 'a' (PLACE, row 1; 4 in all), 'a\\u200b' (PLACE, row 3; 4 in all)"),
        (["yes", "no", "NA"], "label 'NA' (PLACE, row 3) is text and a class"),
        (["yes", "no", "?"], "label '?' (PLACE, row 3) is text and a class"),
        (["a", "b", "a, b"], "label 'a, b' (PLACE, row 3) looks like several labels, but is one class: for several"),
        (["a", "a;c", "c;a"], "label 'a;c' (PLACE, row 2) looks like several labels, but is one class, as are 1 more"),
        (["['a']", "['a', 'b']", "[]"], "label \"['a', 'b']\" (PLACE, row 2) looks like a list written as text"),
        (["1,5", "2", "3,25"], "label '1,5' (PLACE, row 1) looks like a number with a decimal comma"),
    ],
)  # fmt: skip
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


def test_rows_without_a_label_are_counted_over_all_splits(tmp_path: Path) -> None:
    rows = [{**row, "label": "" if row["n"] % 5 == 0 else row["label"]} for row in reviews(120)]
    shares = {"train": {"fraction": 0.8}, "eval": {"fraction": 0.2}}
    message = refused(tmp_path, {"all": rows}, **shares).message
    assert (
        message.startswith("train and eval: 24 rows have no label (`label`): ")
        and "rows 1, 6, 11, 16, 21 (and 19 more)" in message
    )


def test_doubts_are_warnings(tmp_path: Path) -> None:
    train = [*reviews(20, "ab"), {"text": "only one", "label": "c", "n": 99}]
    evals = [{"text": "text 4", "label": "a", "n": 1}, {"text": "new", "label": "b", "n": 2}]
    _, _, warnings = build(tmp_path, {"train": train, "eval": evals}, labels=["a", "b", "c", "d"])
    message = "\n".join(warnings)
    assert f"label 'c' occurs once in train ({tmp_path}/train.csv, row 21)" in message
    assert "eval has no row with label 'c'" in message
    assert "no row with label 'd' in any split" in message
    assert len(warnings) == 3
