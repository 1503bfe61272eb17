"""Token shards: splits made of them are those of one call of the tokenizer; a missing or damaged one is made again."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.tiny import tiny_reviews, write_csv, write_jsonl, write_parquet
from tests.unit.data.conftest import SEED

from afina.errors import DataError
from afina.recipe.keys.train_keys import Tokens
from afina.recipe.schema import Recipe
from afina.worker.data.splits.build_splits import build_splits
from afina.worker.data.tables.data_table import DataSource
from afina.worker.data.tokens import shards, tokenise, write_split
from afina.worker.data.tokens.encode import Encoder
from afina.worker.data.tokens.shards import ShardFolder, ShardMissing
from afina.worker.model.tokenizer import load_tokenizer

Making = Callable[..., tokenise.Tokenising]


def recipe_of(model: Path, data: Path, **changes: Any) -> Recipe:
    spec = {"files": {"all": str(data)}, "text": "text", "label": "stars", **changes}
    return Recipe.model_validate({"name": "big", "model": str(model), "data": spec, "tokens": {"max_length": 24}})


@pytest.fixture
def making(models: Callable[..., Path]) -> Making:
    """Tokenises a file's rows in this process."""

    def make(path: Path, arch: str = "bert", max_length: int = 24, **changes: Any) -> tokenise.Tokenising:
        recipe = recipe_of(models(arch), path, **changes)
        source = DataSource((path,))
        state = source.state()
        table = source.read(recipe.data.label, recipe.data.text)
        chosen = {part: "all" for part in ("train", "eval", "test") if getattr(recipe.data, part) is not None}
        labels, parts = build_splits("auto", recipe.data, {"all": table}, chosen, [])
        checked = tokenise.CheckedData(labels, parts, [], {"all": source}, {"all": state})
        encoder = Encoder(load_tokenizer(models(arch), recipe), Tokens(max_length=max_length))
        return tokenise.Tokenising(checked, recipe.data, encoder, None, np.uint16)

    return make


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """ShardFolder and batches so small that little data has many."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)
    monkeypatch.setattr(tokenise, "_BATCH_BYTES", 900)
    monkeypatch.setattr("afina.worker.data.tokens.write_split._BLOCK_BYTES", 3000)


# -- splits ------------------------------------------------------------------------------------------------------------


PARTS = {"train": {"fraction": 0.6, "sample": 150}, "eval": {"fraction": 0.2}, "test": {"fraction": 0.2, "sample": 31}}


@pytest.mark.parametrize("arch, text", [("bert", ["text"]), ("bert", ["text", "more"]), ("roberta", ["text"])])
def test_splits_from_shards_equal_one_call_of_the_tokenizer(
    making: Making, models: Callable[..., Path], tmp_path: Path, small: None, arch: str, text: list[str]
) -> None:
    rows = [{**row, "more": f"it was {row['rating']}"} for row in tiny_reviews(400)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    tokenising = making(path, arch, text=text, **PARTS)
    store = ShardFolder(tmp_path, "digest", {})
    tokenising.make(store, print)
    assert len(list(store.folder.iterdir())) > 8
    entries, warnings, _ = tokenising.write_splits(store, tmp_path)
    tokenizer = load_tokenizer(models(arch), recipe_of(models(arch), path))
    for split, examples in tokenising.checked.splits.items():
        assert entries[split]["rows"] == len(examples) == {"train": 150, "eval": 80, "test": 31}[split]
        offsets, tokens = (np.load(tmp_path / f"{split}.{name}.npy") for name in ("offsets", "tokens"))
        types = np.load(tmp_path / f"{split}.types.npy") if len(text) > 1 else None
        assert (tmp_path / f"{split}.types.npy").exists() == (len(text) > 1)
        table = pq.read_table(tmp_path / f"{split}.rows.parquet")
        for i, line in enumerate(table["row"].to_pylist()):
            columns = [rows[line - 1][name] for name in text]
            expected = tokenizer(*columns, truncation=True, max_length=24)
            assert tokens[offsets[i] : offsets[i + 1]].tolist() == expected["input_ids"]
            if types is not None:
                assert types[offsets[i] : offsets[i + 1]].tolist() == expected["token_type_ids"]
            if split != "train":
                assert [table[name][i].as_py() for name in ("text", "text_pair")[: len(text)]] == columns
        assert table["row"].to_pylist() == examples.table.row.tolist()
        full = sum(len(tokenizer(*(rows[r - 1][name] for name in text))["input_ids"]) > 24 for r in examples.table.row)
        assert any(w.startswith(f"{full:,} of {len(examples):,} texts of {split}") for w in warnings) or not full
    assert not list(tmp_path.glob("*.spool"))


@pytest.mark.parametrize("how", ["subclass", "python"])
def test_a_tokenizer_with_its_own_code_is_called_directly(models: Callable[..., Path], how: str) -> None:
    import transformers

    class Shouting(transformers.BertTokenizer):  # type: ignore[misc]
        def __call__(self, text: Any, *rest: Any, **options: Any) -> Any:
            return super().__call__([t.replace("a", "the") for t in text], *rest, **options)

    class Letters:
        model_input_names = ("input_ids",)

        def __call__(self, texts: list[str], *, max_length: int | None = None, **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(c) for c in text][:max_length] for text in texts]}

    tokenizer = Shouting.from_pretrained(models("bert")) if how == "subclass" else Letters()
    encoder = Encoder(tokenizer, Tokens(max_length=8))
    found = dict(encoder.encode([(1, [["a", "it"]]), (2, [["fine " * 20]])]))
    expected = tokenizer(["a", "it"], truncation=True, max_length=8)["input_ids"]
    assert found[1].tokens.tolist() == [i for ids in expected for i in ids] and found[1].lengths.tolist() == [
        *map(len, expected)
    ]
    assert found[1].cut.tolist() == [False, False] and found[2].cut.tolist() == [True]
    ends = dict(Encoder(tokenizer, Tokens(max_length=8, truncation="head+tail")).encode([(1, [["a", "fine " * 20]])]))
    whole = tokenizer(["fine " * 20])["input_ids"][0]
    assert ends[1].tokens.tolist() == tokenizer(["a"])["input_ids"][0] + whole[:2] + whole[-6:]
    assert ends[1].cut.tolist() == [False, True]
    if how == "subclass":
        assert found[1].tokens.tolist()[:3] == load_ids(models("bert"), "the")


@pytest.mark.parametrize("arch", ["bert", "roberta"])
def test_head_and_tail_of_long_texts(models: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    """A quarter from the beginning and the rest from the end, special tokens included; a text that just fits is whole."""
    tokenizer = load_tokenizer(models(arch), recipe_of(models(arch), tmp_path))
    texts = [" ".join(f"w{i} a" for i in range(n)) for n in (1, 7, 30, 200)]
    whole = [tokenizer([text])["input_ids"][0] for text in texts]
    for limit in (8, 17, len(whole[1])):
        encoder = Encoder(tokenizer, Tokens(max_length=limit, truncation="head+tail"))
        batch = dict(encoder.encode([(0, [texts])]))[0]
        ends = [ids if len(ids) <= limit else ids[: limit // 4] + ids[-(limit - limit // 4) :] for ids in whole]
        assert batch.tokens.tolist() == [i for ids in ends for i in ids] and batch.lengths.tolist() == [
            len(ids) for ids in ends
        ]
        assert batch.cut.tolist() == [len(ids) > limit for ids in whole]


def load_ids(model: Path, text: str) -> list[int]:
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(str(model))(text)["input_ids"]
    assert isinstance(ids, list)
    return ids


def test_texts_are_the_same_when_they_are_read_again(tmp_path: Path) -> None:
    """Each value becomes a text by itself, whatever stands beside it and wherever a batch ends."""
    values = ["a", " b\n", 7, 1.0, 2.5, True, None, "", "é" * 300]
    rows = [{"text": values[i % len(values)], "label": "x"} for i in range(5000)]
    source = DataSource((write_jsonl(tmp_path / "a.jsonl", rows),))
    texts = [text for (column,) in source.stream(["text"]) for text in column.to_pylist()]
    assert texts == ["a", " b\n", "7", "1", "2.5", "true", None, "", "é" * 300] * 555 + ["a", " b\n", "7", "1", "2.5"]
    kept = source.read(["label"], ["text"]).texts["text"]
    assert kept.sizes[:9].tolist() == [1, 3, 1, 1, 3, 4, 0, 0, 600]
    assert kept.blank[:9].tolist() == [False] * 6 + [True, True, False]
    assert (kept.keys[0] == kept.keys[9]).all() and (kept.keys[0] != kept.keys[1]).any()
    numbers = DataSource((write_parquet(tmp_path / "a.parquet", [{"text": v} for v in (1.0, 2.5, None)]),))
    assert [c.to_pylist() for (c,) in numbers.stream(["text"])] == [["1", "2.5", None]]
    for bad, said in (([1], "holds a list, a text is expected"), ({"a": 1}, "holds an object, a text is expected")):
        source = DataSource((write_jsonl(tmp_path / "b.jsonl", [*rows, {"text": bad, "label": "y"}]),))
        with pytest.raises(DataError, match=rf"b\.jsonl, line 5001: column `text` {said}"):
            source.read(["label"], ["text"])


# -- shards ------------------------------------------------------------------------------------------------------------


def test_a_missing_or_damaged_shard_is_made_again(making: Making, tmp_path: Path, small: None) -> None:
    tokenising = making(write_csv(tmp_path / "a.csv", tiny_reviews(300)))
    store = ShardFolder(tmp_path, "digest", {})
    tokenising.make(store, print)
    tokenising.write_splits(store, tmp_path)
    before = (tmp_path / "train.tokens.npy").read_bytes()
    files = sorted(store.folder.iterdir())
    content = {file.name: file.read_bytes() for file in files}
    spoilt = bytearray(content[files[1].name])
    spoilt[len(spoilt) // 2] ^= 1
    for number, change in enumerate([b"", bytes(spoilt), content[files[2].name][:-40], content[files[0].name]]):
        file = files[number]
        file.unlink() if not change else file.write_bytes(change)
        if number == 3:  # another shard under the name of this one
            assert change != content[file.name]
        with pytest.raises(ShardMissing):
            tokenising.write_splits(store, tmp_path)
        said: list[str] = []
        tokenising.make(store, said.append)
        assert said[0].startswith("resuming an interrupted prepare: ") and len(said) == 1
        assert file.read_bytes() == content[file.name]
    tokenising.write_splits(store, tmp_path)
    assert (tmp_path / "train.tokens.npy").read_bytes() == before


def test_shards_depend_only_on_the_rows_and_their_texts() -> None:
    sizes = np.random.default_rng(SEED).integers(0, 40_000_000, 60)
    rows = np.arange(0, 120, 2)
    cut = shards.plan_shards(0, "all", rows, sizes, np.zeros(60, bool))
    assert np.concatenate([p.rows for p in cut]).tolist() == rows.tolist(), SEED
    assert all(p.sizes[1:].sum() < shards.SHARD_BYTES for p in cut)
    many = shards.plan_shards(0, "all", np.arange(10**6), np.zeros(10**6, np.int64), np.zeros(10**6, bool))
    assert 5 < len(many) < 10 and max(map(len, many)) <= shards.SHARD_BYTES // 64


def test_abandoned_folders_are_swept(tmp_path: Path) -> None:
    now, place = time.time(), tmp_path / "prepare"
    for name, age in (("fresh", 0.9), ("old", 1.1)):
        (place / name).mkdir(parents=True)
        (place / name / "0-00000.npz").write_bytes(b"x")
        os.utime(place / name, (now, now - age * shards.ABANDONED_S))
    shards.sweep(place, now=now)
    assert [p.name for p in place.iterdir()] == ["fresh"]
    shards.sweep(tmp_path / "not there", now=now)


def test_a_file_that_changes_while_it_is_read_is_refused(making: Making, tmp_path: Path, small: None) -> None:
    rows = tiny_reviews(200)
    for change in (
        lambda path: write_csv(path, rows[:100]),
        lambda path: path.write_text(path.read_text() + "new,1,1\n"),
    ):
        path = write_csv(tmp_path / "a.csv", rows)
        tokenising = making(path)
        change(path)
        with pytest.raises(DataError, match=r"a\.csv: changed while it was read") as error:
            tokenising.make(ShardFolder(tmp_path, str(random.random()), {}), print)
        assert error.value.remedy


# -- token statistics --------------------------------------------------------------------------------------------------


def test_texts_without_content_tokens_are_counted() -> None:
    stats = write_split.TokenStats(np.array([1, 2]), 9)
    stats.add(
        {"tokens": (np.array([1, 5, 2, 1, 2, 9]), np.array([3, 0, 2, 1, 0])), "cut": (np.zeros(5, bool), np.ones(5))}
    )
    stats.add({"tokens": (np.array([5]), np.array([0, 1])), "cut": (np.ones(2, bool), np.ones(2))})
    assert (stats.bare, stats.content, stats.unknown, stats.cut, stats.rows) == ([1, 2, 4, 5], 3, 1, 2, 7)
