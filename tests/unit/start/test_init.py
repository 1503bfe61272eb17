"""`afina init`: from files, or a data set of the Hub, to a recipe that is prepared; refusals."""

from __future__ import annotations

import csv
import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import tiny
from tests.hub.server import HubServer
from tests.unit.conftest import Ran, tree
from tests.unit.data.stage import prepare, prepare_here, result
from tests.unit.start.conftest import Init, reviews

from afina.api import plan_for
from afina.recipe.parse import load_recipe
from afina.recipe.schema import Recipe

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
        (["--data", "reviews.xlsx"], "format .xlsx is not known", "save the sheet as `CSV UTF-8`; known formats: .csv, .tsv"),
        (["--data", "empty.csv"], "empty.csv: the file is empty", "the first line names the columns"),
        (["--data", "head.csv"], "no rows", "each further one is an example"),
        (["--data", "latin.csv"], "not UTF-8", "--encoding cp1252"),
        (["--data", "no head.csv"], "the first line looks like a row", "--no-header on a command line, or --header NAME,NAME"),
        (["--data", "below.json"], "records under `data`", "--field data"),
        (["--data", "reviews.csv", "--field", "a"], "--field: is for JSON files", "leave it out"),
        (["--data", "reviews.csv", "--encoding", "cp12522"], "--encoding: no encoding `cp12522`; did you mean `cp1252`?", "--help"),
        (["--data", "broken.jsonl"], "broken.jsonl, line 2: not valid JSON", "correct that line"),
        (["--data", "reviews.csv", "--text", "txt"], "--text txt: ", "did you mean `text`?"),
        (["--data", "reviews.csv", "--label", "star"], "--label star: ", "did you mean `stars`?"),
        (["--data", "reviews.csv", "--label", "text", "--text", "text"], "none of the columns may be a label", "once"),
        (["--data", "numbers.csv"], "no default: Text column", "give it with --text, one of `a`, `b`"),
        (["--data", "reviews.csv", "--model", "./minlm"], "--model ./minlm: no such folder", "did you mean `minilm`?"),
        (["--data", "reviews.csv", "--model", "a/b/c"], "--model a/b/c: no such folder", "or a Hub id (owner/name)"),
        (["--data", "reviews.csv", "--config", "x"], "belongs to a Hub data set", "leave it out"),
        ([], "no default: Data", "give it with --data"),
    ],
)  # fmt: skip
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
            "reviews.xlsx": b"PK", "empty.csv": b"", "head.csv": b"text,label\n",
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
    argv = [sys.executable, "-m", "afina", "init"]
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
    remedy = "give it with --text, one of `id`, `text`, `stars`, `rating`, or take all defaults with --yes"
    assert remedy in done.stderr
    assert not (tmp_path / "recipe.yaml").exists()
