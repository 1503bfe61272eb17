"""The prepare stage on real files and a tiny model: its answer, exit codes, messages, and the files it leaves."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.tiny import tiny_reviews, write_csv, write_jsonl
from tests.unit.conftest import tree
from tests.unit.data.stage import leftovers, prepare, prepare_here, refused, refused_here, result, start

from afina.run.plan import Plan
from afina.site.settings import Site
from afina.worker.data import prepared

#: Read before the test environment forgets it.
TEST_DATA = os.environ.get("AFINA_TEST_DATA")


# -- the prepared data ------------------------------------------------------------------------------------------------


def test_prepare_then_find_it_again(plan: Callable[..., Plan], reviews: Path) -> None:
    made = plan()
    first = result(prepare(made))
    folder = Path(first["prepared"])
    assert folder == made.site.prepared / first["digest"] and leftovers(made) == [first["digest"]]
    assert first["task"] == "single-label" and first["labels"] == ["1", "2", "3", "4", "5"]
    assert first["rows"] == {"train": 96, "eval": 24} and first["reused"] is False
    assert first["model_folder"] == made.recipe.model and first["model_commit"] is first["data_commit"] is None

    assert prepare_here(made) == {**first, "reused": True}

    manifest = prepared.verify(folder)
    assert manifest["num_labels"] == 5 and manifest["max_length"] == 64 and manifest["text_columns"] == ["text"]
    rows = list(csv.DictReader(reviews.read_text(encoding="utf-8").splitlines(keepends=True)))
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    assert manifest["pad_token_id"] == tokenizer.pad_token_id
    for name, count in first["rows"].items():
        split = prepared.open_split(folder, name)
        table = pq.read_table(folder / f"{name}.rows.parquet").to_pydict()
        assert len(split) == count and int(split.lengths.sum()) == first["tokens"][name] == len(split.tokens)
        assert split.types is None and split.tokens.dtype == np.uint16
        assert ("text" in table) == (name != "train") and set(table["file"]) == {str(reviews)}
        for i, number in enumerate(table["row"]):
            row = rows[number - 1]
            ids = tokenizer(row["text"], truncation=True, max_length=64)["input_ids"]
            assert split.tokens[split.offsets[i] : split.offsets[i + 1]].tolist() == ids
            assert manifest["labels"][split.labels[i]] == row["stars"]


def test_groups_are_counted_and_a_shared_one_stands_beside_the_numbers(
    plan: Callable[..., Plan], tmp_path: Path
) -> None:
    rows = [{**row, "author": f"author {i % 30}"} for i, row in enumerate(tiny_reviews(120, seed=5))]
    whole, first, rest = (
        str(write_csv(tmp_path / f"{name}.csv", some))
        for name, some in (("whole", rows), ("first", rows[:89]), ("rest", rows[89:]))
    )
    divided = prepare_here(plan(data={"files": whole, "group": "author", "split_by": "text"}))
    assert divided["groups"] == {"train": 24, "eval": 6} and divided["rows"] == {"train": 96, "eval": 24}
    assert divided["spoiled"] == {} and divided["digest"] != prepare_here(plan(data={"files": whole}))["digest"]
    leaking = prepare_here(plan(data={"files": {"train": first, "eval": rest}, "group": "author"}))
    assert leaking["groups"] == {"train": 30, "eval": 30}
    (warning,) = leaking["spoiled"]["eval"]
    assert warning.startswith("31 of 31 rows of eval belong to groups (`author`) that are in train too: 30 groups")
    assert warning in leaking["warnings"]


def test_the_same_input_gives_the_same_bytes(plan: Callable[..., Plan]) -> None:
    made = plan()
    folder = Path(result(prepare(made))["prepared"])
    before = tree(folder)
    shutil.rmtree(folder)
    # As if the site file or the user's shell had another language and launcher.
    env = {
        "WORLD_SIZE": "4",
        "RANK": "1",
        "MASTER_ADDR": "nowhere",
        "LC_ALL": "C.UTF-8",
        "TOKENIZERS_PARALLELISM": "false",
        "SLURM_CPUS_PER_TASK": "1",
    }
    assert Path(result(prepare(made, env=env))["prepared"]) == folder
    assert tree(folder) == before


def test_the_digest_covers_what_decides_the_content_and_nothing_else(
    plan: Callable[..., Plan], models: Callable[..., Path]
) -> None:
    base = prepare_here(plan())["digest"]
    same = plan(name="other", train={"epochs": 9, "seed": 5}, metrics=["accuracy"])
    assert prepare_here(same)["reused"] is True
    changes: list[dict[str, Any]] = [
        {"tokens": {"max_length": 63}},
        {"data": {"eval": {"seed": 1, "sample": 10}}},
        {"data": {"id": "rating"}},
        {"task": "regression"},
        {"model": models("distilbert")},
    ]
    assert len({base, *(prepare_here(plan(**change))["digest"] for change in changes)}) == 1 + len(changes)


def test_regression_multi_label_and_pairs(plan: Callable[..., Plan], tmp_path: Path) -> None:
    ran = prepare_here(plan(data={"label": "rating"}))
    assert (ran["task"], ran["labels"]) == ("regression", None)
    assert prepared.open_split(ran["prepared"], "train").labels.dtype == np.float32
    rows = [
        {
            "a": r["text"],
            "b": "it was fine",
            "tags": ["good, or so"] * (r["stars"] > 3) + ["long"] * (len(r["text"]) > 60),
        }
        for r in tiny_reviews(60)
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    ran = prepare_here(plan(data={"files": {"all": str(path)}, "text": ["a", "b"], "label": "tags"}))
    assert (ran["task"], ran["labels"]) == ("multi-label", ["good, or so", "long"])
    split = prepared.open_split(ran["prepared"], "eval")
    assert split.labels.shape == (12, 2) and split.types is not None and len(split.types) == len(split.tokens)
    assert set(np.unique(split.types)) == {0, 1}
    assert {"text", "text_pair"} <= set(pq.read_schema(Path(ran["prepared"]) / "eval.rows.parquet").names)


def test_ids_and_groups_keep_every_digit(plan: Callable[..., Plan], tmp_path: Path) -> None:
    rows = [{**r, "id": 1234567890123456789 + n, "author": 2**60 + n // 5} for n, r in enumerate(tiny_reviews(60))]
    rows[7] |= {"id": 0.5, "author": 0.5}
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = {
        "files": {"all": str(path)},
        "label": "stars",
        "id": "id",
        "group": "author",
        "split_by": "text",
        "train": {"fraction": 0.6},
    }
    ran = prepare_here(plan(data={**data, "eval": {"fraction": 0.4}}))
    authors = {}
    for split in ("train", "eval"):
        table = pq.read_table(Path(ran["prepared"]) / f"{split}.rows.parquet").to_pydict()
        assert table["id"] == [str(rows[line - 1]["id"]) for line in table["row"]]
        authors[split] = {str(rows[line - 1]["author"]) for line in table["row"]}
    assert not authors["train"] & authors["eval"] and len(authors["train"] | authors["eval"]) == 13


def test_more_than_two_texts_are_joined_by_the_tokenizers_separator(plan: Callable[..., Plan], tmp_path: Path) -> None:
    rows = [
        {"a": r["text"], "b": f"title {n}", "c": "" if n % 3 else "more", "label": n % 2}
        for n, r in enumerate(tiny_reviews(20))
    ]
    data = {"files": {"all": str(write_csv(tmp_path / "a.csv", rows))}, "text": ["a", "b", "c"], "label": "label"}
    ran = prepare_here(plan(data=data))
    table = pq.read_table(Path(ran["prepared"]) / "eval.rows.parquet").to_pydict()
    split = prepared.open_split(ran["prepared"], "eval")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(Path(ran["prepared"]) / "tokenizer"))
    for i, number in enumerate(table["row"]):
        row = rows[number - 1]
        assert table["text"][i] == f"{row['a']} [SEP] {row['b']} [SEP] {row['c']}"
        tokens = split.tokens[split.offsets[i] : split.offsets[i + 1]].tolist()
        assert tokens == tokenizer(table["text"][i])["input_ids"] and tokens.count(tokenizer.sep_token_id) == 3
    write_csv(tmp_path / "a.csv", [*rows, {"a": " ", "b": "", "c": "", "label": 1}])
    assert "1 row has an empty text (`a`, `b`, `c`)" in refused_here(plan(data=data))


def test_warnings_of_long_texts_and_small_splits(plan: Callable[..., Plan]) -> None:
    ran = prepare(plan(tokens={"max_length": 12}, train={"batch_size": 128}))
    warnings = result(ran)["warnings"]
    assert any("longer than tokens.max_length 12 and were cut" in w for w in warnings)
    assert any("fewer than train.batch_size 128" in w for w in warnings)
    assert all(f"warning: {w}" in ran.stderr for w in warnings)
    split = prepared.open_split(result(ran)["prepared"], "train")
    assert split.lengths.max() == 12


def test_real_reviews(plan: Callable[..., Plan]) -> None:
    if not TEST_DATA:
        pytest.skip("AFINA_TEST_DATA names no folder with amazon_reviews.csv")
    files = {"files": {"all": f"{TEST_DATA}/amazon_reviews.csv"}, "id": "id"}
    ran = prepare_here(plan(data=files, tokens={"max_length": 128}))
    assert ran["labels"] == ["1", "2", "3", "4", "5"] and sum(ran["rows"].values()) == 3708
    assert prepare_here(plan(data={**files, "label": "rating"}))["task"] == "regression"


# -- damage, races, signals, a full disk ------------------------------------------------------------------------------


def test_damaged_data_is_set_aside_and_made_again(plan: Callable[..., Plan]) -> None:
    made = plan()
    folder = Path(prepare_here(made)["prepared"])
    (folder / "train.tokens.npy").write_bytes(b"short")
    messages: list[str] = []
    assert prepare_here(made, messages)["reused"] is False and "train.tokens.npy: has 5 bytes" in messages[0]
    prepared.verify(folder)
    assert sorted(leftovers(made)) == sorted([f".damaged-{folder.name[-8:]}-1", folder.name])


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_no_incomplete_data(
    plan: Callable[..., Plan], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    big = write_csv(tmp_path / "big.csv", tiny_reviews(30_000))
    made = plan(data={"files": {"all": str(big)}})
    child = start(made)
    deadline = time.monotonic() + 60
    while not list(made.site.cache.glob("prepare/*/*.npz")):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert out == "" and "Traceback" not in err and "finished token shards are kept for the next time" in err
    assert leftovers(made) == []
    assert {path.suffix for path in made.site.cache.glob("prepare/*/*")} == {".npz"}


def test_a_limit_while_writing_is_one_message(plan: Callable[..., Plan], tmp_path: Path) -> None:
    big = write_csv(tmp_path / "big.csv", tiny_reviews(20_000))
    made = plan(data={"files": {"all": str(big)}})

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    message = refused(prepare(made, preexec_fn=limit), 3)
    assert "File too large" in message and "(200,000 bytes here, `ulimit -f`)" in message
    assert leftovers(made) == [] and list(made.site.cache.glob("prepare/*")) == []


def test_a_full_disk_is_refused_before_writing(
    plan: Callable[..., Plan], models: Callable[..., Path], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        made = plan().model_copy(update={"site": Site(scratch=small)})
        assert "are needed" in refused(prepare(made), 3)
        assert leftovers(made) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_scratch_that_cannot_be_written(plan: Callable[..., Plan], tmp_path: Path) -> None:
    file = tmp_path / "not a folder"
    file.write_text("")
    made = plan().model_copy(update={"site": Site(scratch=file)})
    ran = prepare(made)
    assert ran.returncode == 3 and "Traceback" not in ran.stderr, ran.stderr


# -- errors of the user ----------------------------------------------------------------------------------------------


def test_errors_as_json_for_a_parent(plan: Callable[..., Plan]) -> None:
    ran = prepare(plan(data={"label": "star"}), "--json")
    assert ran.returncode == 2 and "error:" not in ran.stderr
    failure = json.loads(ran.stdout.splitlines()[-1])["failure"]
    assert failure["kind"] == "DataError" and "no column `star`" in failure["message"]
    assert failure["remedy"] == "did you mean `stars`?"


def test_not_a_plan(site: Site) -> None:
    assert "standard input is not a plan" in refused(prepare("{}"), 2)
    assert "standard input is not a plan" in refused(prepare(""), 2)
    assert "unknown argument --jsno" in refused(prepare("{}", "--jsno"), 2)


@pytest.mark.parametrize(
    "raw, expected",
    [
        ("text,stars\ncafé,1\n".encode("latin-1"), "row 1 (line 2): byte 0xe9"),
        (b"text,stars\r\n" + b"a,1\r\n,2\r\n" * 9, "rows have an empty text"),
        (b"text,stars\na,1\nb,1\nc,1\nd,1\ne,1\nf,1\ng,1\nh,1\n", "at least two labels are needed"),
        (b"text,stars\n", "no rows"),
    ],
)
def test_bad_data(plan: Callable[..., Plan], reviews: Path, raw: bytes, expected: str) -> None:
    made = plan(data={"train": {"split": "all"}, "eval": {"split": "all"}})
    reviews.write_bytes(raw)
    message = refused_here(made)
    assert (expected in message and str(reviews) in message.replace("train: ", "")) or "every row" in message
    assert leftovers(made) == []


def test_arguments_that_cannot_work_here_are_refused(plan: Callable[..., Plan], tmp_path: Path) -> None:
    """All of them: tests/unit/model/test_check_arguments.py."""
    made = plan(train={"arguments": {"wieght_decay": 0.1}})
    message = refused_here(made)
    assert "has no such argument" in message and "did you mean `weight_decay`?" in message
    assert leftovers(made) == [] and list(Path.cwd().iterdir()) == []


def spoil(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "spoilt"))


def test_truncated_weights(plan: Callable[..., Plan], models: Callable[..., Path], tmp_path: Path) -> None:
    folder = spoil(models(), tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refused(prepare(plan(folder)), 2)
    assert str(weights) in message and "not a whole safetensors file" in message


def test_no_tokenizer(plan: Callable[..., Plan], models: Callable[..., Path], tmp_path: Path) -> None:
    folder = spoil(models(), tmp_path)
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    assert "has no tokenizer" in refused_here(plan(folder))
    (folder / "tokenizer.json").write_text("{}")
    assert "cannot be loaded" in refused_here(plan(folder))


@pytest.mark.parametrize(
    "config, expected",
    [
        ("{", "cannot be read"),
        ("{}", "names no `model_type`"),
        ('{"model_type": "never-heard-of"}', "refuses"),
        ('{"model_type": "vit"}', "no sequence classification for architecture `vit`"),
    ],
)
def test_a_config_that_cannot_be_used(
    plan: Callable[..., Plan], models: Callable[..., Path], tmp_path: Path, config: str, expected: str
) -> None:
    folder = spoil(models(), tmp_path)
    (folder / "config.json").write_text(config)
    assert expected in refused_here(plan(folder))


@pytest.mark.parametrize("arch", ["bert", "roberta"])
def test_longer_than_the_model_has_positions(plan: Callable[..., Plan], models: Callable[..., Path], arch: str) -> None:
    message = refused_here(plan(models(arch), tokens={"max_length": 129}))
    assert "129 is more than the 128 positions" in message and "set tokens.max_length to 128 or less" in message
    prepare_here(plan(models(arch), tokens={"max_length": 128}))
