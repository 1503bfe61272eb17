"""Chunks of rows over files of every format: every row once, in order, with its place; the prepare stage's texts."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests import tiny

from afina.errors import DataError, InputError
from afina.worker.data.tables.data_table import DataSource
from afina.worker.data.tables.words import read_row
from afina.worker.predicting import inputs
from afina.worker.predicting.inputs import Inputs, examine, read_chunks
from afina.worker.predicting.parts import Parts

SEED = int(os.environ.get("AFINA_TEST_SEED", str(random.SystemRandom().randrange(1 << 30))))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Rows 0 to 359 in five formats; JSON Lines with blank lines."""
    rows = [{"n": n, "text": f"text {n} " + "long " * (n % 17)} for n in range(360)]
    written = [
        tiny.write_csv(tmp_path / "a.csv", rows[:100]),
        tiny.write_tsv(tmp_path / "b.tsv", rows[100:200]),
        tmp_path / "c.jsonl",
        tmp_path / "d.json",
        tmp_path / "e.parquet",
    ]
    written[2].write_text("\n".join(json.dumps(row) + "\n" for row in rows[200:280]))
    written[3].write_text(json.dumps(rows[280:300]))
    pq.write_table(pa.Table.from_pylist(rows[300:]), written[4], row_group_size=7)
    return written


@pytest.mark.parametrize("chunk_bytes", [32 << 20, 2000])
def test_chunks_hold_every_row_once_with_its_place(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    chance = random.Random(SEED)
    monkeypatch.setattr(inputs, "CHUNK_BYTES", chunk_bytes)
    chunk_rows = chance.choice([1, 7, 50, 99, 360, 1000])
    with pytest.raises(DataError, match=r"column `n` is int64, in .*a.csv it is string"):
        examine(files, ["text"], None, chunk_rows)
    found = Inputs.from_json(json.loads(json.dumps(examine(files, ["text"], (), chunk_rows).to_json())))
    assert found.rows == 360 and max(found.chunks) <= chunk_rows, f"seed {SEED}"
    assert chunk_bytes > 2000 or len(found.chunks) > 5
    wanted = set(chance.sample(range(len(found.chunks)), max(1, len(found.chunks) // 2)))
    some = {chunk.number: chunk for chunk in read_chunks(found, files, wanted)}
    assert set(some) == wanted
    chunks = list(read_chunks(found, files, range(len(found.chunks))))
    assert [len(chunk) for chunk in chunks] == list(found.chunks)
    for chunk in chunks:
        if chunk.number in some:
            assert some[chunk.number].texts == chunk.texts and (some[chunk.number].row == chunk.row).all()
    texts = [text for chunk in chunks for text in chunk.texts[0].to_pylist()]
    assert texts == [text for (column,) in DataSource(tuple(files)).stream(["text"]) for text in column.to_pylist()]
    places = [chunk.where(i, [Path(f.name) for f in files]) for chunk in chunks for i in range(len(chunk))]
    assert places[0] == "a.csv, row 1" and places[199] == "b.tsv, row 100"
    assert places[201] == "c.jsonl, line 3" and places[281] == "d.json, record 2" and places[-1] == "e.parquet, row 60"


def test_columns_are_copied_in_the_types_of_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": 1.0, "whole": 1, "mixed": 2, "flag": True},
        {"text": "b", "whole": 2.5, "mixed": [1, "ü"], "big": 2**70},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows * 2000]))
    found = examine([path], ["text"], None, 3000)
    assert {field.name: str(field.type) for field in found.schema} == {
        "text": "string", "whole": "double", "mixed": "string", "flag": "bool", "big": "string"
    }  # fmt: skip
    chunk = next(read_chunks(found, [path], {0}))
    assert chunk.texts[0].to_pylist()[:2] == ["1", "b"], "as training reads them"
    assert chunk.table.to_pylist()[1] == {
        "text": "b",
        "whole": 2.5,
        "mixed": '[1, "ü"]',
        "flag": None,
        "big": str(2**70),
    }
    assert examine([path], ["text"], ["flag", "absent"], 10).schema.names == ["flag"]


def test_a_file_that_lost_rows_is_refused(files: list[Path]) -> None:
    found = examine(files, ["text"], (), 50)
    tiny.write_csv(files[0], [{"n": 1, "text": "only one"}])
    with pytest.raises(DataError, match="261 rows, 360 were there before"):
        list(read_chunks(found, files, {0, len(found.chunks) - 1}))


def test_parts_of_an_older_afina_are_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "identity": {}}))
    with pytest.raises(InputError, match="made by an older afina") as refused:
        Parts(tmp_path)
    assert "remove that folder" in refused.value.remedy
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read"):
        Parts(tmp_path)


def test_words_of_lists_are_those_of_training(tmp_path: Path) -> None:
    """Also of words with a space, and of the lists that Polars writes."""
    rows = [["New York", "is", "b c"], [], None]
    kinds: dict[str, Any] = {"list.parquet": pa.list_(pa.string()), "large.parquet": pa.large_list(pa.large_string())}
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"tokens": words} for words in rows])
    for name, kind in kinds.items():
        pq.write_table(pa.table({"tokens": pa.array(rows, kind)}), tmp_path / name)
    for path in (tmp_path / name for name in ("a.jsonl", *kinds)):
        found = examine([path], ["tokens"], [], 9, words=True)
        (chunk,) = read_chunks(found, [path], [0])
        assert chunk.texts[0].to_pylist() == ["New York is b c", "", None], path
        assert chunk.divided[0].tolist() == [[0, 8], [9, 11], [12, 15]], path
        assert chunk.divided[0].tolist() == read_row("", rows[0], ["O"] * 3)[0].tolist()
        assert (len(chunk.divided[1]), chunk.divided[2]) == (0, None)
    tiny.write_jsonl(tmp_path / "a.jsonl", [{"tokens": ["a"]}, {"tokens": ["a", " "]}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, word 2: ' ' is not a word"):
        examine([tmp_path / "a.jsonl"], ["tokens"], [], 9, words=True)


def test_sentences_of_a_conll_file_are_texts_beside_their_columns(tmp_path: Path) -> None:
    path = tiny.write_conll(tmp_path / "a.conll", tiny.tagged_sentences(9))
    found = examine([path], ["tokens"], None, 4)
    chunks = list(read_chunks(found, [path], range(3)))
    assert [text for chunk in chunks for text in chunk.texts[0].to_pylist()] == [
        " ".join(words) for words, _ in tiny.tagged_sentences(9)
    ]
    assert chunks[0].table.column_names == ["tokens", "column2", "ner_tags"]
    assert chunks[0].where(1, [path]).startswith(f"{path}, line ")
