"""Columns of data files: texts as they are, types, class labels, several files. Errors of formats: `tests/unit/recipe/test_formats`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.tiny import star_names, tiny_reviews, write_csv, write_jsonl, write_parquet, write_tsv

from afina.errors import DataError
from afina.worker.data.tables.data_table import DataTable, as_text, list_places, read_files

NASTY = [
    "plain", 'he said "no"', "a, b; c\td", "two\nlines\r\nthree", "naïve 😀 Ünïcödé", "'; echo foo", "NA", "", " x ",
]  # fmt: skip


def column(table: DataTable, name: str) -> list[object]:
    values = table.columns[name].to_pylist()
    assert isinstance(values, list)
    return values


def refused(path: Path, raw: bytes | str, columns: list[str]) -> DataError:
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(DataError) as error:
        read_files([path], columns)
    assert str(path) in error.value.message
    assert error.value.remedy
    return error.value


@pytest.mark.parametrize(
    "write, suffix", [(write_csv, ".csv"), (write_tsv, ".tsv"), (write_jsonl, ".jsonl"), (write_parquet, ".parquet")]
)
def test_every_format_gives_the_same_texts(tmp_path: Path, write: object, suffix: str) -> None:
    folder = tmp_path / 'it\'s "here", ünï'
    folder.mkdir()
    rows = [{"text": text, "label": f"l,{i}"} for i, text in enumerate(NASTY)]
    path = folder / f"a b{suffix}"
    write(path, rows)  # type: ignore[operator]
    table = read_files([path], ["text", "label"])
    assert column(table, "text") == NASTY
    assert column(table, "label") == [f"l,{i}" for i in range(len(NASTY))]
    assert table.row.tolist() == list(range(1, len(NASTY) + 1))
    assert str(path) in table.where(3) and table.where(3).endswith(" 4")


def test_cells_are_text_and_nothing_is_guessed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\r\nNA,1\r\n,007\r\n2020-01-01,1.50\r\nnull,TRUE\r\n")
    table = read_files([path], ["label", "text"])
    assert column(table, "text") == ["NA", "", "2020-01-01", "null"]
    assert column(table, "label") == ["1", "007", "1.50", "TRUE"]


def test_a_cell_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "word " * (4 << 20)
    write_csv(path, [{"text": long, "label": 1}, {"text": "short", "label": 2}])
    assert column(read_files([path], ["text"]), "text") == [long, "short"]


def test_a_quote_inside_a_cell_of_a_tsv(tmp_path: Path) -> None:
    path = tmp_path / "b.tsv"
    path.write_text('text\tlabel\nhe said "Great"\t1\n')
    assert column(read_files([path], ["text"]), "text") == ['he said "Great"']


def test_undecodable_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xe9\xff"))
    pq.write_table(pa.table({"text": bad}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 1: column `text` holds bytes that are not UTF-8"):
        read_files([path], ["text"])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_column_that_is_not_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}[suffix](path, [{"Text": "a", "stars": 1}])
    with pytest.raises(DataError) as error:
        read_files([path], ["text"])
    assert "no column `text`; columns: `Text`, `stars`" in error.value.message
    assert error.value.remedy == "did you mean `Text`?"


def test_a_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("text,label\n")
    assert len(read_files([path], ["text"])) == 0


def test_json_lines_are_located(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert "holds an object here" in refused(path, '{"text": "a"}\n{"text": {"b": 1}}\n', ["text"]).message
    path.write_text('{"text": "a"}\n\n{"text": "b", "more": 1}\n')
    table = read_files([path], ["text"])
    assert table.row.tolist() == [1, 3]
    assert table.where(1).endswith("a.jsonl, line 3")


def test_json_values_keep_their_kind(tmp_path: Path) -> None:
    rows = [
        {"i": 1, "f": 1.5, "b": True, "l": ["x", 2], "m": 1, "n": None},
        {"i": 2, "f": 2, "b": False, "l": [], "m": "a"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    table = read_files([path], ["i", "f", "b", "l", "m"])
    assert [str(c.type) for c in table.columns.values()] == [
        "int64",
        "double",
        "bool",
        "list<item: large_string>",
        "large_string",
    ]
    assert column(table, "l") == [["x", "2"], []]
    assert column(table, "m") == ["1", "a"]


def test_one_json_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    table = read_files([path], ["text"])
    assert column(table, "text") == ["a", "b"]
    assert table.where(1).endswith("a.json, record 2")


def test_class_labels_become_names_in_their_order(tmp_path: Path) -> None:
    names = list(reversed(star_names()))
    rows = [{"text": r["text"], "stars": r["stars"] - 1} for r in tiny_reviews(10)]
    path = write_parquet(tmp_path / "a.parquet", rows, {"stars": names})
    table = read_files([path], ["text", "stars"])
    assert column(table, "stars") == [names[r["stars"]] for r in rows]
    assert table.classes == {"stars": tuple(names)}
    write_parquet(path, [{"text": "a", "stars": -1}], {"stars": names})
    assert column(read_files([path], ["stars"]), "stars") == [None]


def test_lists_of_class_labels(tmp_path: Path) -> None:
    label = {"names": ["a", "b", "c"], "_type": "ClassLabel"}
    features: list[Any] = [{"feature": label, "_type": "List"}, {"feature": label, "_type": "Sequence"}, [label]]
    for feature in features:
        for kind in (pa.list_(pa.int64()), pa.large_list(pa.int64())):
            about = {"huggingface": json.dumps({"info": {"features": {"tags": feature}}})}
            table = pa.table({"tags": pa.array([[0, 2], [], None, [1]], kind)}).replace_schema_metadata(about)
            pq.write_table(table, tmp_path / "a.parquet")
            assert column(read_files([tmp_path / "a.parquet"], ["tags"]), "tags") == [["a", "c"], [], None, ["b"]]


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    assert "not a readable Parquet file" in refused(path, path.read_bytes()[:-10], ["text"]).message


def test_several_files_are_one_table(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": "c", "label": 3}])
    table = read_files([first, second], ["text", "label"])
    assert column(table, "label") == ["1", "2", "3"]
    assert [table.where(i).rpartition("/")[2] for i in range(3)] == ["a.csv, row 1", "a.csv, row 2", "b.jsonl, row 1"]
    assert list_places(table, np.arange(3)).replace(f"{tmp_path}/", "") == "a.csv, rows 1, 2; b.jsonl, row 1"
    write_csv(tmp_path / "c.csv", [{"text": "d"}])
    with pytest.raises(DataError, match=r"c\.csv: there is no column `label`"):
        read_files([first, tmp_path / "c.csv"], ["text", "label"])


def test_take_keeps_rows_and_places_together(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"text": str(i)} for i in range(10)])
    taken = read_files([path], ["text"]).take(np.array([7, 2]))
    assert column(taken, "text") == ["7", "2"]
    assert taken.row.tolist() == [8, 3]
    assert list_places(taken, np.arange(2)) == f"{path}, rows 8, 3"


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1, 20, None], ["1", "20", None]),
        ([True, False, None], ["true", "false", None]),
        ([1.0, 2.0, None], ["1", "2", None]),
        ([1.0, 2.5], ["1", "2.5"]),
        ([1.0, float("nan")], ["1", None]),
        ([" a ", "b\n"], ["a", "b"]),
    ],
)
def test_scalars_as_text(values: list[object], expected: list[str | None]) -> None:
    assert as_text(pa.array(values)).to_pylist() == expected


def test_half_of_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    half = '{"a": "x"}\n{"a": "cut \\ud83d"}\n'
    assert r"a.jsonl, line 2: column `a` holds \ud83d, half of a character" in refused(path, half, ["a"]).message
    with pytest.raises(DataError, match=r"line 2: column `a` holds .*half of a character"):
        read_files([path], [], ["a"])
