"""What `afina init` takes each column for, and that its proposal is prepared as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tests import tiny
from tests.unit.data.stage import prepare_here
from tests.unit.start.conftest import Init, reviews

from afina.api import plan_for
from afina.cli.start_commands import init as init_command
from afina.errors import InputError
from afina.recipe.parse import load_recipe
from afina.recipe.schema import Recipe
from afina.run.plan import Plan


def test_a_label_by_its_values_alone_is_a_guess_that_is_named(
    init: Init, no_cluster: Path, tmp_path: Path, scratch: Path, model: Path
) -> None:
    verdicts = ("very bad", "bad", "so so", "good", "very good")
    rows = [
        {"Kunde": f"K{n % 37}", "Text": row["text"], "Urteil": verdicts[row["stars"] - 1], "author": f"A{n % 40}"}
        for n, row in enumerate(reviews())
    ]
    data = tiny.write_csv(tmp_path / "r.csv", rows)
    guessed = init(tmp_path / "p", "--data", data, "--model", model)
    warning = "`Urteil` is taken as the label, a guess by its values; if it is `Kunde`: `label:` here, or --label"
    assert guessed["recipe"].data.label == ("Urteil",) and guessed["warnings"] == [warning]
    assert f"# WARNING: {warning}" in guessed["text"]
    assert init(tmp_path / "q", "--data", data, "--model", model, "--label", "Urteil")["warnings"] == []
    argv = [str(tmp_path / "r"), "--data", str(data), "--model", str(model), "--scratch", str(scratch)]
    asked = CliRunner().invoke(init_command, argv, input="\n\n\n")
    assert asked.exit_code == 0 and "Label column [Urteil]" in asked.stderr and "a guess" not in asked.stdout
    tiny.write_csv(data, [{"stars" if key == "Urteil" else key: value for key, value in row.items()} for row in rows])
    assert init(tmp_path / "s", "--data", data, "--model", model)["warnings"] == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "train", "train", "validation", "test"], {"train": 90, "eval": 30, "test": 30}),
        (["Train", "train", "train", "train", "test"], {"train": 120, "test": 30}),
        (["train", "train", "train", "part 2", "test"], None),
        (["a", "b", "a", "b", "a"], None),
    ],
    ids=["three", "without eval", "an unknown name", "other values"],
)
def test_a_column_that_names_splits_is_proposed(
    init: Init, tmp_path: Path, model: Path, names: list[str], expected: dict[str, int] | None
) -> None:
    rows = [{**row, "split": names[i % 5]} for i, row in enumerate(reviews())]
    data = tiny.write_csv(tmp_path / "reviews.csv", rows)
    answer = init(tmp_path / "project", "--data", data, "--model", model, "--label", "stars")
    proposed: Recipe = answer["recipe"]
    assert proposed.data.split_column == (None if expected is None else "split")
    if expected is None:
        assert proposed.data.train.fraction == 0.8
        return
    shown = ", ".join(f"{split} {rows}" for split, rows in expected.items())
    if "eval" in expected:
        assert f"# the column `split` names the split of each row: {shown}" in answer["text"]
        assert proposed.data.train.fraction is None and proposed.data.test is not None
    else:
        assert proposed.data.train.fraction == 0.9 and proposed.data.eval.fraction == 0.1
        assert proposed.data.eval.split == "train" and proposed.data.test is not None


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("Author", [f"writer {n % 40}" for n in range(150)], True),
        ("patient_id", [n % 60 for n in range(150)], True),
        ("author", [f"writer {n}" for n in range(150)], False),  # one text each: nothing to keep together
        ("author", [f"writer {n % 5}" for n in range(150)], False),  # larger than a part may be
        ("author", [None, *(f"writer {n % 40}" for n in range(149))], False),
        ("colour", [f"shade {n % 40}" for n in range(150)], False),
    ],
    ids=["authors", "numbers", "one text each", "few", "gaps", "another name"],
)
def test_a_column_of_authors_is_proposed_as_the_group(
    init: Init, tmp_path: Path, model: Path, name: str, values: list[Any], expected: bool
) -> None:
    rows = [{**row, name: value} for row, value in zip(reviews(), values, strict=True)]
    data = tiny.write_csv(tmp_path / "reviews.csv", rows)
    answer = init(tmp_path / "project", "--data", data, "--model", model, "--label", "stars")
    assert answer["recipe"].data.group == (name if expected else None)
    assert (f"# one source: whole groups of `{name}` are divided" in answer["text"]) == expected
    if name == "Author":
        done = prepare_here(plan_for(tmp_path / "project/recipe.yaml"))
        assert sum(done["rows"].values()) == 150


def test_a_column_of_weights_is_named_and_not_used(init: Init, tmp_path: Path, model: Path) -> None:
    rows = [{**row, "weight": 0.5 + n % 3} for n, row in enumerate(reviews())]
    data = tiny.write_csv(tmp_path / "reviews.csv", rows)
    answer = init(tmp_path / "project", "--data", data, "--model", model, "--label", "stars")
    assert (
        answer["recipe"].data.weight is None
        and "if it holds the weight of each row: `weight: weight`" in answer["text"]
    )


@pytest.mark.slow
def test_parts_pairs_lists_and_numbers_are_recognised_and_prepared(init: Init, tmp_path: Path, model: Path) -> None:
    rows = reviews(200)
    plans: list[Plan] = []

    def proposed(*arguments: object) -> dict[str, Any]:
        folder = tmp_path / str(len(plans))
        answer = init(folder, "--data", *arguments, "--model", model)
        plans.append(plan_for(folder / "recipe.yaml"))
        return answer

    parts = tmp_path / "parts"
    parts.mkdir()
    for name, some in (("train", rows[:120]), ("validation", rows[120:160]), ("test", rows[160:])):
        tiny.write_csv(parts / f"{name}.csv", some)
    proposed(parts, "--label", "stars")

    # One of them stands for all; where there is no eval part a tenth of train is kept for it.
    two = tmp_path / "two parts"
    two.mkdir()
    for name in ("train", "test"):
        (two / f"{name}.csv").write_bytes((parts / f"{name}.csv").read_bytes())
    proposed(two / "train.csv", "--label", "stars")

    many = [
        {"text": r["text"], "tags": ["good"] * (r["stars"] > 3) + ["strong"] * (r["stars"] in (1, 5))} for r in rows
    ]
    answer = proposed(tiny.write_jsonl(tmp_path / "many.jsonl", many))
    assert answer["recipe"].data.label == ("tags",) and answer["recipe"].train.best_metric == "f1"

    joined = [{"text": r["text"], "label": "|".join(m["tags"]) or "neither"} for r, m in zip(rows, many, strict=True)]
    assert proposed(tiny.write_csv(tmp_path / "joined.csv", joined))["recipe"].data.label_separator == "|"

    scored = [{"sentence": r["text"], "score": r["rating"]} for r in rows]
    answer = proposed(tiny.write_tsv(tmp_path / "scores.tsv", scored))
    assert answer["recipe"].train.best_metric == "mse" and "a regression" in answer["text"]

    names = tiny.star_names()
    classes = [{"text": r["text"], "label": r["stars"] - 1} for r in rows]
    answer = proposed(tiny.write_parquet(tmp_path / "classes.parquet", classes, {"label": names}))
    assert set(answer["labels"]) == set(names), "labels by their names"

    found = [prepare_here(plan) for plan in plans]
    assert found[0]["rows"] == {"train": 120, "eval": 40, "test": 40}
    assert found[1]["rows"] == {"train": 109, "eval": 11, "test": 40}
    assert [f["task"] for f in found] == ["single-label", "single-label", "multi-label", "multi-label", "regression", "single-label"]  # fmt: skip
    assert found[3]["labels"] == ["good", "neither", "strong"] and found[5]["labels"] == names


def test_every_file_has_the_columns(
    init: Init, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d"
    data.mkdir()
    (data / "a.csv").write_text("text,label\nit was good,1\nit was bad,0\n")
    for other, message in (
        ("good one here now,1\n", "b.csv: there is no column"),
        ("label,text,label\n", "occurs twice"),
    ):
        (data / "b.csv").write_text(other)
        with pytest.raises(SystemExit):
            init(tmp_path / "p", "--data", data, "--model", model)
        assert message in capsys.readouterr().err and not (tmp_path / "p/recipe.yaml").exists()


def test_a_header_that_looks_like_a_row_is_asked_about(
    no_cluster: Path, tmp_path: Path, scratch: Path, model: Path
) -> None:
    data = tmp_path / "no head.csv"
    data.write_text('"2","Awful","it was broken"\n"1","Nice","it was best"\n' * 9)
    argv = ["--data", str(data), "--model", str(model), "--name", "n", "--scratch", str(scratch)]
    for answer, rows, text in (
        ("y\n\n\n\n", 18, "column3"),
        ("\n\n\n\n", 18, "column3"),
        ("n\n\n\n\n", 17, "it was broken"),
    ):
        folder = tmp_path / f"p{answer[0]}"
        done = CliRunner().invoke(init_command, [str(folder), *argv], input=answer)
        assert done.exit_code == 0 and "looks like a row" in done.stderr, done.stderr
        recipe = load_recipe(folder / "recipe.yaml")
        assert recipe.data.text == (text,) and recipe.data.header is (False if rows == 18 else None)
        assert f"{rows} rows" in done.stdout
    for more, given in (([], ""), (["--yes"], None), (["--json"], None)):
        done = CliRunner().invoke(init_command, [str(tmp_path / "q"), *argv, *more], input=given)
        assert isinstance(done.exception, InputError) and "--no-header" in done.exception.remedy
    assert not (tmp_path / "q/recipe.yaml").exists()


def test_entities_are_found_in_every_form(init: Init, tmp_path: Path, model: Path) -> None:
    sentences = tiny.tagged_sentences(40, 3)
    spans = []
    for words, tags in sentences:
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        each: list[list[Any]] = []
        for word, tag, end in zip(words, tags, ends.tolist(), strict=True):
            if tag.startswith("B"):
                each.append([end - len(word), end, tag[2:]])
            elif tag.startswith("I"):
                each[-1][1] = end
        spans.append({"text": " ".join(words), "spans": each})
    objects = [
        {**row, "spans": [dict(zip(("start", "end", "label"), s, strict=True)) for s in row["spans"]]} for row in spans
    ]
    files = [
        tiny.write_conll(tmp_path / "a.conll", sentences),
        tiny.write_jsonl(tmp_path / "b.jsonl", [{"tokens": words, "ner_tags": tags} for words, tags in sentences]),
        tiny.write_jsonl(tmp_path / "c.jsonl", spans),
        tiny.write_jsonl(tmp_path / "d.jsonl", objects),
    ]
    strong = sum(label == "STRONG" for row in spans for *_, label in row["spans"])
    for file in files:
        answer = init(tmp_path / file.stem, "--data", file, "--model", model)
        assert answer["recipe"].task == "token-classification", file
        assert f"'STRONG' {strong}" in answer["text"], file
