"""`afina init`: what it sees in data of every format, and that what it proposes is read and prepared as it stands."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tests import tiny
from tests.common import program
from tests.hub.server import HubServer
from tests.unit.conftest import Ran, tree
from tests.unit.data.stage import prepare, prepare_here, result

from afina import cli
from afina.api import plan_for
from afina.cli.start_commands import init as init_command
from afina.errors import InputError
from afina.recipe.parse import load_recipe
from afina.recipe.schema import Recipe
from afina.run.plan import Plan
from afina.start.examine import count_words
from afina.start.find_machine import find_machine

Init = Callable[..., dict[str, Any]]


@pytest.fixture
def no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """First on PATH, a cluster that does not answer and no module system."""
    folder = tmp_path / "fake bin"
    for name in ("sinfo", "scontrol", "sacctmgr"):
        program(folder, name, "exit 1\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def init(no_cluster: Path, scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Init:
    """Runs `afina init FOLDER … --json` here; returns what it says and the recipe it wrote."""

    def run(folder: Path | str, *arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        cli.main(["init", str(folder), *map(str, arguments), "--scratch", str(scratch), "--json"])
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        answer["recipe"] = load_recipe(Path(folder) / "recipe.yaml")
        answer["text"] = (Path(folder) / "recipe.yaml").read_text()
        monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
        return answer

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("it's a model") / "tiny model")


def reviews(count: int = 150, seed: int = 3) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", **row} for n, row in enumerate(tiny.tiny_reviews(count, seed))]


# -- from files to a recipe that is prepared ---------------------------------------------------------------------------


def test_a_csv_becomes_a_recipe_that_is_prepared(init: Init, tmp_path: Path, model: Path) -> None:
    data = tiny.write_csv(tmp_path / "re views; 'mine'.csv", reviews())
    answer = init(tmp_path / "pro ject", "--data", data, "--model", model, "--label", "stars")
    recipe: Recipe = answer["recipe"]
    assert (recipe.data.text, recipe.data.label, recipe.data.id) == (("text",), ("stars",), "id")
    assert answer["rows"] == 150 and sum(answer["labels"].values()) == 150 and answer["warnings"] == []
    assert recipe.metrics is not None and recipe.train.best_metric == recipe.metrics[0] == "accuracy"
    done = prepare_here(plan_for(tmp_path / "pro ject/recipe.yaml"))
    assert (done["rows"], done["task"], len(done["labels"])) == ({"train": 122, "eval": 28}, "single-label", 5)
    # The length was counted with the tokenizer: about one text in a hundred is cut, and the share is answer.
    assert not [w for w in done["warnings"] if "were cut" in w]
    assert f"{recipe.tokens.max_length}}}" in answer["text"] and "by the model's tokenizer" in answer["text"]


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


def test_the_folder_of_an_adapter_is_trained_on(init: Init, tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "model"
    (folder / "classifier").mkdir(parents=True)
    (folder / "classifier/config.json").write_text("{}")
    config = {
        "base_model_name_or_path": str(model),
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "target_modules": ["query"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    data = tiny.write_csv(tmp_path / "reviews.csv", reviews())
    answer = init(tmp_path / "project", "--data", data, "--model", folder, "--label", "stars")
    assert answer["recipe"].model == str(folder) and answer["recipe"].adapter is not None
    assert "by the model's tokenizer" in answer["text"]  # that of its base


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


def test_every_path_and_name_survives(init: Init, tmp_path: Path, nasty: str, model: Path) -> None:
    """The recipe is read back and names the very file; or it is refused and nothing is written."""
    folder = tmp_path / nasty
    folder.mkdir()
    column = nasty.replace("\n", " ")
    data = folder / f"{nasty[:40]}.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([column, "label: x"])
        writer.writerows((r["text"], r["stars"]) for r in reviews(30))
    answer = init(
        folder, "--data", data, "--text", column, "--label", "label: x", "--model", model, "--name", "a: 'b' #c"
    )
    assert plan_for(folder / "recipe.yaml").files == {"all": (data,)}
    assert answer["recipe"].data.text == (column,) and answer["recipe"].name == "a: 'b' #c"
    assert Path("pwned").exists() is False


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


def test_options_of_reading_are_written_into_the_recipe(init: Init, tmp_path: Path, model: Path) -> None:
    rows = [f"a text {n}|{n % 5}" for n in range(40)]
    data = tmp_path / "r.csv.gz"
    data.write_bytes(gzip.compress("\r\n".join(["It’s a row|5", *rows]).encode("cp1252")))
    options = ("--delimiter", "|", "--encoding", "cp1252", "--header", "text,stars")
    answer = init(tmp_path / "p", "--data", data, *options, "--model", model)
    data = answer["recipe"].data
    assert (data.delimiter, data.encoding, data.header) == ("|", "cp1252", ("text", "stars"))
    assert answer["rows"] == 41 and answer["warnings"] == [] and answer["recipe"].name == "r"
    done = prepare_here(plan_for(tmp_path / "p/recipe.yaml"))
    assert sum(done["rows"].values()) == 41


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


def test_windows_that_are_named_in_place_of_head_and_tail_fit_the_model(
    init: Init, tmp_path: Path, model: Path
) -> None:
    rows = [{"text": f"{n} " + "word " * (200 if n % 8 == 0 else 20), "label": "ab"[n % 2]} for n in range(80)]
    text = init(tmp_path / "p", "--data", tiny.write_csv(tmp_path / "r.csv", rows), "--model", model)["text"]
    (named,) = re.findall(r"`(windows: {.*?})` in its place", text)
    (tmp_path / "p/recipe.yaml").write_text(text.replace("truncation: head+tail", named))
    assert load_recipe(tmp_path / "p/recipe.yaml").tokens.windows is not None


def test_a_text_that_is_not_in_english_gets_a_model_that_reads_it(init: Init, tmp_path: Path) -> None:
    rows = [{"text": f"Очень хорошая книга номер {n}", "label": n % 2} for n in range(40)]
    assert init(tmp_path / "p", "--data", tiny.write_csv(tmp_path / "r.csv", rows))["recipe"].model == "FacebookAI/xlm-roberta-base"  # fmt: skip
    # A language without spaces has a token for each character.
    assert count_words("这本书非常好。") == 7 and count_words("It's good.") == 5


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_fetched_to_where_prefetch_finds_it(
    init: Init, tmp_path: Path, scratch: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "stars": row["stars"] - 1} for row in tiny.tiny_reviews(60, 1)]
    card = tiny.dataset_card(
        {"default": {"train": "train.parquet", "validation": "dev.parquet"}}, {"stars": tiny.star_names()}, {"text": "string", "rating": "float64"}
    )  # fmt: skip
    files = {
        "README.md": card,
        "train.parquet": tiny.parquet_bytes(rows[:40]),
        "dev.parquet": tiny.parquet_bytes(rows[40:]),
    }
    with HubServer(tmp_path / "hub") as hub:
        hub.add_dataset("me/reviews", files)
        for name, value in hub.env(scratch / "cache/huggingface").items():
            monkeypatch.setenv(name, value)
        answer = init(tmp_path / "p", "--data", "me/reviews", "--model", model)
        recipe: Recipe = answer["recipe"]
        assert (recipe.name, recipe.data.hub, recipe.data.label) == ("reviews", "me/reviews", ("stars",))
        assert answer["rows"] == 40 and set(answer["labels"]) == set(tiny.star_names())
        assert recipe.data.eval.split == "validation"
        hub.clear()
        done = result(prepare(plan_for(tmp_path / "p/recipe.yaml")))
        assert done["rows"] == {"train": 40, "eval": 20} and not hub.requests, "asked the Hub again"


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(init: Init, afina: Callable[..., Ran], tmp_path: Path, no_cluster: Path) -> None:
    data = tiny.write_csv(tmp_path / "r.csv", reviews(30))
    folder = tmp_path / "p"
    answer = init(folder, "--data", data, "--label", "stars")
    assert [Path(w).name for w in answer["written"]] == ["site.env", "recipe.yaml"]
    before = tree(folder)
    done = afina("init", folder, "--data", data, "--yes")
    assert done.returncode == 2 and f"{folder}/recipe.yaml exists already, and is not overwritten" in done.stderr
    done = afina("init", folder, "--site-only", "--yes")
    assert done.returncode == 2 and "slurm/site.env exists already" in done.stderr
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("arguments", "answer", "remedy"),
    [
        (["--data", "revews.csv"], "--data revews.csv: no such file or folder", "did you mean `reviews.csv`?"),
        (
            ["--data", "reviews.xlsx"],
            "format .xlsx is not known",
            "save the sheet as `CSV UTF-8`; known formats: .csv, .tsv",
        ),
        (["--data", "empty.csv"], "empty.csv: the file is empty", "the first line names the columns"),
        (["--data", "head.csv"], "no rows", "each further one is an example"),
        (["--data", "semi.csv"], "seems to be separated by `;`", "--delimiter ';'"),
        (["--data", "latin.csv"], "not UTF-8", "--encoding cp1252"),
        (
            ["--data", "no head.csv"],
            "the first line looks like a row",
            "--no-header on a command line, or --header NAME,NAME",
        ),
        (["--data", "below.json"], "records under `data`", "--field data"),
        (["--data", "reviews.csv", "--field", "a"], "--field: is for JSON files", "leave it out"),
        (
            ["--data", "reviews.csv", "--encoding", "cp12522"],
            "--encoding: no encoding `cp12522`; did you mean `cp1252`?",
            "--help",
        ),
        (["--data", "broken.jsonl"], "broken.jsonl, line 2: not valid JSON", "correct that line"),
        (["--data", "reviews.csv", "--text", "txt"], "--text txt: ", "did you mean `text`?"),
        (["--data", "reviews.csv", "--label", "star"], "--label star: ", "did you mean `stars`?"),
        (["--data", "reviews.csv", "--label", "text", "--text", "text"], "none of the columns may be a label", "once"),
        (["--data", "numbers.csv"], "no default: Text column", "give it with --text"),
        (["--data", "reviews.csv", "--model", "./minlm"], "--model ./minlm: no such folder", "did you mean `minilm`?"),
        (["--data", "reviews.csv", "--model", "a/b/c"], "--model a/b/c: no such folder", "or a Hub id (owner/name)"),
        (["--data", "reviews.csv", "--config", "x"], "belongs to a Hub data set", "leave it out"),
        ([], "no default: Data", "give it with --data"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    command: Callable[..., Ran],
    no_cluster: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    answer: str,
    remedy: str,
) -> None:
    here = tmp_path / "files" if arguments else tmp_path / "none"
    here.mkdir()
    if arguments:
        tiny.write_csv(here / "reviews.csv", reviews(20))
        tiny.write_csv(here / "numbers.csv", [{"a": n, "b": n % 2} for n in range(20)])
        (here / "minilm").mkdir()
        for name, raw in {
            "reviews.xlsx": b"PK", "empty.csv": b"", "head.csv": b"text,label\n", "semi.csv": b"text;label\ngood;1\n",
            "no head.csv": b'"2","Awful","it was broken"\n"1","Nice","it was best"\n' * 9,
            "below.json": b'{"v": 1, "data": [{"text": "a", "label": 1}]}',
            "latin.csv": b"text,label\ncaf\xe9 au lait,1\n", "broken.jsonl": b'{"text": "a", "label": 1}\n{"text": \n',
        }.items():  # fmt: skip
            (here / name).write_bytes(raw)
    monkeypatch.chdir(here)
    done = command("init", "new", *arguments, "--yes")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    assert answer in done.stderr and remedy in done.stderr
    assert not (here / "new").exists(), "looks first, writes last"


def test_a_data_set_that_the_hub_does_not_have_leaves_nothing(
    command: Callable[..., Ran], no_cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetching it needs a site and its scratch; both are removed, and what was there before stays."""
    (tmp_path / "project").mkdir()
    (Path.cwd() / "reviews").mkdir()
    with HubServer(tmp_path / "hub") as hub:
        for name, value in hub.env(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        done = command("init", "project", "--data", "reviws", "--scratch", tmp_path / "new/scratch", "--yes")
    assert done.returncode == 3 and "reviws" in done.stderr and "remedy" in done.stderr, done
    assert "no file or folder here has that name. did you mean `reviews`?" in done.stderr
    assert list((tmp_path / "project").iterdir()) == [] and not (tmp_path / "new").exists()


def test_questions_have_defaults(tmp_path: Path, no_cluster: Path, scratch: Path) -> None:
    """Enter takes the default; a table of the columns comes first; an end of input is no answer."""
    tiny.write_csv(tmp_path / "reviews.csv", reviews(40))
    argv = [sys.executable, "-m", "afina.cli", "init"]
    env = {**os.environ, "AFINA_SCRATCH": str(scratch)}
    done = subprocess.run(
        argv, input="\n\n\nrating\n\nmy run\n", env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Data: a file, a folder, or the id of a Hub data set [reviews.csv]:" in done.stderr
    assert "Text column [text]:" in done.stderr and "distinct in 40 rows" in done.stderr
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.name, recipe.data.label, recipe.data.text) == ("my run", ("rating",), ("text",))
    (tmp_path / "recipe.yaml").unlink()
    done = subprocess.run(argv, input="\n", env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no answer: Text column" in done.stderr, done.stderr
    assert "--text, or take all defaults with --yes" in done.stderr and not (tmp_path / "recipe.yaml").exists()


# -- the machine -------------------------------------------------------------------------------------------------------


def test_the_site_says_what_the_cluster_says(command: Callable[..., Ran], no_cluster: Path, tmp_path: Path) -> None:
    sinfo = (
        "cpu*|up|2-00:00:00|1-infinite|10|48|190000|(null)|idle\nlong|up|7-00:00:00|1-4|4|64|512000|gpu:a100:4|mixed\n"
    )
    program(no_cluster, "sinfo", f"printf '{sinfo}'\n")
    program(no_cluster, "scontrol", "echo 'ClusterName = elk'\n")
    program(
        no_cluster, "sacctmgr",
        'case "$*" in *assoc*user=me*) printf "elk|physics||normal,long|normal|\\nelk|maths||normal||\\n";; esac\n',
    )  # fmt: skip
    (tmp_path / "big scratch").mkdir()
    data = tiny.write_csv(tmp_path / "r.csv", reviews(60))
    env = {"USER": "me", "SCRATCH": str(tmp_path / "big scratch"), "AFINA_SCRATCH": None}
    image = tmp_path / "afina.sif"
    from tests.unit.conftest import sif_bytes

    image.write_bytes(sif_bytes())
    done = command("init", tmp_path / "p", "--data", data, "--label", "stars", "--image", image, "--yes", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "afina submit recipe.yaml"
    site = tmp_path / "p/slurm/site.env"
    shown = subprocess.run(
        ["bash", "-c", 'set -eu; USER=me; . "$1"; printf "%s\\n" "$AFINA_SCRATCH" "$AFINA_IMAGE" "$SBATCH_PARTITION" "$SBATCH_ACCOUNT"', "x", site],
        env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert shown == [f"{tmp_path}/big scratch/afina", str(image), "long", "physics"]
    assert (tmp_path / "big scratch/afina").is_dir()
    text = site.read_text()
    assert "cpu*: up to 2 days; 10 × 48 cores, 185 GB" in text and "long: up to 7 days; 4 × 64 cores, 500 GB, 4 GPUs (a100)" in text  # fmt: skip
    assert "Your accounts (sacctmgr): physics, maths" in text and "QOS that they allow: normal, long" in text
    resources = load_recipe(tmp_path / "p/recipe.yaml").resources
    assert (resources.gpus_per_node, resources.cpus_per_gpu) == (1, 8)


def test_a_module_is_loaded_where_apptainer_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "only these"
    for name in ("bash",):
        folder.mkdir()
        (folder / name).symlink_to(f"/bin/{name}")
    home = Path(os.environ["HOME"])
    listed = "/apps/modules:\\napptainer/1.2.5\\napptainer/1.3.4(default)\\nsingularity/3.8\\n"
    (home / ".bash_profile").write_text(f"module() {{ printf '{listed}' >&2; }}\nPATH='{folder}'\n")
    monkeypatch.setenv("PATH", str(folder))
    machine = find_machine(tmp_path, {**os.environ, "AFINA_IMAGE": "/nowhere/afina.sif"}, scratch=str(tmp_path))
    assert (machine.module, machine.runtime) == ("apptainer/1.3.4", "apptainer")
    assert machine.image == "/nowhere/afina.sif" and "does not exist yet" in machine.image_why
