"""Options of reading, and files of every kind: training, prediction and `afina init` read the same rows, or refuse them alike."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afina.errors import DataError, InputError
from afina.formats.columns import distinct, partitions
from afina.formats.notes import Notes
from afina.formats.read_options import PLAIN, ReadOptions, format_of
from afina.formats.rows import read_rows
from afina.recipe.data_files import find_files, split_of
from afina.recipe.keys.data_keys import Data
from afina.worker.data.tables.data_table import DataTable, read_files
from afina.worker.predicting.inputs import examine, read_chunks

ROWS = [("a good text", "pos"), ("ein schöner “Text”", "neg"), ("x, y; z", "pos")]
RECORDS = [{"text": text, "label": label} for text, label in ROWS]


def three_ways(
    path: Path, reading: ReadOptions = PLAIN, text: str = "text", label: str = "label"
) -> list[tuple[str, str]]:
    """Text and label of each row as training reads them, after comparing them with prediction and init."""
    table = read_files([path], [label], [text], reading=reading)
    rows = list(zip(texts_of(path, text, reading), map(as_label, table.columns[label].to_pylist()), strict=True))
    found = examine([path], [text], (), 10, reading)
    assert [t for c in read_chunks(found, [path], range(len(found.chunks))) for t in c.texts[0].to_pylist()] == [
        t for t, _ in rows
    ]
    assert [(row[text], as_label(row[label])) for row in read_rows(path, reading)] == rows
    return rows


def as_label(value: Any) -> str:
    return value[0] if isinstance(value, list) else value


def texts_of(path: Path, text: str, reading: ReadOptions) -> list[str]:
    return list(read_files([path], [text], reading=reading).columns[text].to_pylist())


def warnings_of(path: Path, reading: ReadOptions = PLAIN) -> list[str]:
    """The warnings of training, which are those of prediction and of init."""
    table = read_files([path], [], ["text"], reading=reading)
    assert examine([path], ["text"], None, 10, reading).warnings == table.warnings
    return list(table.warnings)


def csv_text(delimiter: str = ",", header: bool = True, quote: str = '"') -> str:
    rows = [("text", "label"), *ROWS] if header else ROWS
    return "".join(f"{quote}{text}{quote}{delimiter}{label}\r\n" for text, label in rows)


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("a.csv", csv_text().encode("utf-8-sig"), {}),
        ("a.csv", csv_text().encode("cp1252"), {"encoding": "cp1252"}),
        ("a.csv", csv_text().encode("utf-16"), {"encoding": "utf-16"}),
        ("a.tsv", csv_text("\t").encode("utf-16-le"), {"encoding": "UTF-16LE"}),
        ("a.csv", csv_text().encode("utf-16"), {"encoding": "utf-16-le"}),
        ("a.csv", csv_text(";").encode(), {"delimiter": ";"}),
        ("a.csv", csv_text("\t").encode(), {"delimiter": "tab"}),
        ("a.tsv", csv_text("|").encode("cp1252"), {"delimiter": "|", "encoding": "windows-1252"}),
        ("a.csv", csv_text(header=False).encode(), {"header": ["text", "label"]}),
        ("a.csv", csv_text(",").replace("\r\n", "\r").encode(), {}),
        ("a.csv", csv_text(",").replace("\r\n", "\r\n\n").encode(), {}),
        ("a.tsv", csv_text("\t", quote="").encode(), {"quoting": "none"}),
        ("a.csv.gz", gzip.compress(csv_text().encode()), {}),
        ("a.tsv.xz", lzma.compress(csv_text("\t").encode("cp1252")), {"encoding": "cp1252"}),
        ("a.csv.bz2", bz2.compress(csv_text().encode()), {}),
        ("A.CSV.ZST", pa.compress(csv_text().encode(), "zstd", asbytes=True), {}),
        ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, RECORDS)).encode()), {}),
        ("a.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS).encode("utf-16"), {"encoding": "utf-16"}),
        ("a.json", "\n".join(json.dumps(r, indent=1) for r in RECORDS).encode(), {}),
        ("a.json", json.dumps({"v": "1", "data": RECORDS}).encode(), {"field": "data"}),
        ("a.json", json.dumps({"v": 1, "data": {"rows": RECORDS}}, indent=1).encode(), {"field": "data.rows"}),
        ("a.jsonl", "\n".join(json.dumps({"row": r}) for r in RECORDS).encode(), {"field": "row"}),
        ("a.json", json.dumps({key: [r[key] for r in RECORDS] for key in RECORDS[0]}).encode(), {}),
        ("a.json", json.dumps({key: {str(i): r[key] for i, r in enumerate(RECORDS)} for key in RECORDS[0]}).encode(), {}),
        ("a.json", json.dumps({str(i): r for i, r in enumerate(RECORDS)}).encode(), {}),
        ("a.json", json.dumps({f"r{i}": r for i, r in enumerate(RECORDS)}).encode(), {}),
        ("a.csv", b"\xef\xbb\xbf" + csv_text().encode("utf-8-sig"), {}),
        ("a.json", json.dumps({"columns": ["text", "label"], "index": [0, 1, 2], "data": ROWS}).encode(), {}),
        ("a.json", json.dumps({"schema": {}, "data": RECORDS}).encode(), {"field": "data"}),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, (dict, str)) else "",
)  # fmt: skip
def test_the_same_rows_however_they_are_written(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert three_ways(path, ReadOptions.model_validate(options)) == ROWS


def test_nested_columns(tmp_path: Path) -> None:
    nested = [{"data": {"text": t}, "annotations": [{"result": [{"value": {"choices": [v]}}]}]} for t, v in ROWS]
    path = tmp_path / "label studio.json"
    path.write_text(json.dumps(nested))
    label = "annotations.0.result.0.value.choices"
    table = read_files([path], ["data.text", label])
    assert table.columns["data.text"].to_pylist() == [t for t, _ in ROWS] and table.columns[label].to_pylist() == [
        [v] for _, v in ROWS
    ]
    assert next(read_rows(path)) == {"data.text": ROWS[0][0], label: ["pos"]}
    with pytest.raises(DataError) as error:
        read_files([path], ["text"])
    assert error.value.remedy == "did you mean `data.text`?"

    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.table({"data": [{"text": t, "more": {"label": v}} for t, v in ROWS], "n": [1, 2, 3]}), parquet)
    assert three_ways(parquet, text="data.text", label="data.more.label") == ROWS
    with pytest.raises(DataError, match="is of type struct") as error:
        read_files([parquet], [], ["data"])
    assert "`data.text`" in error.value.remedy


def test_an_element_of_a_list_is_a_column(tmp_path: Path) -> None:
    """`a.0` in lists of any kind, of objects too, and of class labels; null where a list is shorter."""
    lists = [["x", "y"], ["z"], None, []]
    objects = [[{"v": ["p"]}, {"v": ["q", "r"]}], [{"v": None}], [], None]
    path = tmp_path / "a.parquet"
    ids = pa.array([[1, 0], [0], [1], [1]])
    columns = {
        "l": pa.array(lists),
        "o": pa.array(objects),
        "c": ids,
        "f": pa.array([[7, 8]] * 4, pa.list_(pa.int8(), 2)),
    }
    features = {"c": {"feature": {"_type": "ClassLabel", "names": ["neg", "pos"]}, "_type": "Sequence"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(about), path, row_group_size=3)
    rows = tmp_path / "a.jsonl"
    names = [["pos", "neg"], ["neg"], ["pos"], ["pos"]]
    each = zip(lists, objects, names, strict=True)
    rows.write_text("".join(json.dumps({"l": a, "o": o, "c": c, "f": [7, 8]}) + "\n" for a, o, c in each))
    wanted = {
        "l.0": ["x", "z", None, None],
        "l.1": ["y", None, None, None],
        "o.0.v.0": ["p", None, None, None],
        "o.1.v.1": ["r", None, None, None],
        "c.0": ["pos", "neg", "pos", "pos"],
        "f.1": [8, 8, 8, 8],
    }
    for file in (path, rows):
        table = read_files([file], list(wanted))
        assert {name: column.to_pylist() for name, column in table.columns.items()} == wanted, file
        for name in ("l.x", "l.-1", "l.0.0.v", "o.v", "n.0"):
            with pytest.raises(DataError, match=f"there is no column `{name}`"):
                read_files([file], [name])
    assert read_files([path], ["c.0"]).classes == {"c.0": ("neg", "pos")}


def test_a_file_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(csv_text(header=False))
    assert three_ways(path, ReadOptions(header=False), "column1", "column2") == ROWS
    with pytest.raises(DataError, match="row 1: 2 cells, the option `header` names 3 columns"):
        read_files([path], ["a"], reading=ReadOptions(header=("a", "b", "c")))
    path.write_text("1,it was a good day\n0,it was a bad day\n")
    with pytest.raises(DataError) as error:
        read_files([path], [], ["text"])
    assert "--no-header on a command line" in error.value.remedy


def test_quoted_cells_with_another_separator_than_the_option_say_which(tmp_path: Path) -> None:
    """A file of commas for a run that was trained on one of semicolons, and the reverse."""
    path = tmp_path / "a.csv"
    for mark, reading in ((",", ReadOptions(delimiter=";")), (";", PLAIN)):
        path.write_text(f'"text"{mark}"label"\n"one, two"{mark}"pos"\n')
        with pytest.raises(DataError, match=f"seems to be separated by `{mark}`") as error:
            list(read_rows(path, reading))
        assert f"--delimiter '{mark}'" in error.value.remedy
    path.write_text('"text" and more\n"one"\n')
    with pytest.raises(DataError, match="text follows a closing quote"):
        list(read_rows(path))


# -- warnings ----------------------------------------------------------------------------------------------------------


def test_quotes_that_swallow_rows_are_noted_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    lines = [f"text {n}\tpos" for n in range(9)]
    path.write_text("\n".join(["text\tlabel", *lines[:3], f'"{lines[3]}', *lines[4:6], 'so it is"\tpos', *lines[6:]]))
    (warning,) = warnings_of(path)
    assert warning.startswith(f"{path}, row 4: spans lines, because of a quote") and "--quoting none" in warning
    notes = Notes()
    assert len(list(read_rows(path, PLAIN, notes))) == 7 and notes.warnings(path, "row") == [warning]
    assert len(texts_of(path, "text", ReadOptions(quoting="none"))) == 10 and not warnings_of(
        path, ReadOptions(quoting="none")
    )

    path = tmp_path / "a.csv"
    path.write_text('text,label\n"a\nb, c",pos\n"two\nlines",neg\n')
    assert warnings_of(path) == [], "texts of several lines are usual in CSV"
    path.write_text('text,label\r\n"however,\r\nit works",pos\r\n"well,\r\nit does",neg\r\n')
    assert warnings_of(path) == [], "a comma at the end of a line is prose"
    path.write_text('text,label\n"great,pos\nbad,neg\nthe end",pos\nc,neg\n')
    assert "row 1: holds a quote that swallows the rows up to the next one" in warnings_of(path)[0]


@pytest.mark.parametrize(
    ("content", "warning"),
    [
        ("it\x92s", "row 2: holds control characters (U+0080 to U+009F) where Windows has quotes"),
        ("caf\ufffd", "row 2: holds U+FFFD"),
        ("cafÃ© itâ€™s", "row 2: holds letters such as Ã© or â€™"),
        ("text", "row 2: repeats the header"),
        ("\ufefftext", "row 2: repeats the header"),
        ("âge Ânesse NÃO Ã propos", ""),
        (" NaN", "row 2: the text is a word for a missing value"),
        ("#VALUE!", "row 2: the text is a word for a missing value"),
        ("nan bread and none of it null", ""),
    ],
)
def test_damaged_texts_are_noted(tmp_path: Path, content: str, warning: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text\nfirst one\n{content}\nlast one\n", encoding="utf-8")
    found = warnings_of(path)
    assert len(found) == bool(warning) and all(warning in line for line in found), found


def test_a_column_of_ids_as_text_and_a_header_that_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "".join(f"r{n},t-{n}\n" for n in range(50)))
    assert "column `text` looks like ids" in warnings_of(path)[0]
    path.write_text("text,pos\n" + "".join(f"words {n},{'pos' if n % 2 else 'neg'}\n" for n in range(50)))
    assert "the header's cells occur as values" in warnings_of(path)[0]


# -- types -------------------------------------------------------------------------------------------------------------


def test_ids_keep_every_digit(tmp_path: Path) -> None:
    ids = [1234567890123456789, 0.5, None, 7]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": f"t {i}"}) + "\n" for i in ids))
    wanted = ["1234567890123456789", "0.5", None, "7"]
    assert read_files([path], ["id"], ids=["id"]).columns["id"].to_pylist() == wanted
    found = examine([path], ["text"], None, 10)
    assert next(read_chunks(found, [path], {0})).table.column("id").to_pylist() == wanted
    # Whole numbers and fractions in batches of their own.
    path.write_text(
        "".join(
            json.dumps({"id": i + 0.5 if n > 3000 else i, "text": "t"}) + "\n"
            for n, i in enumerate([2**60 + 1] * 3000 + [1] * 3000)
        )
    )
    found = examine([path], ["text"], None, 10000)
    assert next(read_chunks(found, [path], {0})).table.column("id").to_pylist()[0] == str(2**60 + 1)
    second = tmp_path / "b.parquet"
    pq.write_table(pa.table({"id": [2**60 + 1, 5]}), second)
    path.write_text('{"id": 0.5}\n')
    assert read_files([second, path], ["id"], ids=["id"]).columns["id"].to_pylist() == [str(2**60 + 1), "5", "0.5"]
    assert read_files([second, path], ["id"]).columns["id"].to_pylist() == [str(2**60 + 1), "5", "0.5"]


def columns_of(table: pa.Table, tmp_path: Path, suffix: str = ".parquet") -> DataTable:
    path = tmp_path / f"types{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with (
            pa.OSFile(str(path), "wb") as sink,
            (pa.ipc.new_file if suffix == ".feather" else pa.ipc.new_stream)(sink, table.schema) as out,
        ):
            out.write_table(table)
    return read_files([path], table.column_names)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_columnar_types(tmp_path: Path, suffix: str) -> None:
    import datetime
    import decimal

    table = pa.table(
        {
            "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
            "view": pa.array(["a", None, "c"], pa.string_view()),
            "unsigned": pa.array([2**64 - 1, 7, None], pa.uint64()),
            "large": pa.array(["a", None, "c"], pa.large_string()),
            "binary": pa.array([b"a", "ü".encode(), None]),
            "whole": pa.array([decimal.Decimal(10**30), None, decimal.Decimal(5)], pa.decimal128(38, 0)),
            "decimal": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal(5)], pa.decimal128(9, 2)),
            "date": pa.array([datetime.date(2024, 1, 2), None, None]),
            "time": pa.array([datetime.datetime(2024, 1, 2, 3), None, None]),
            "bool": [True, None, False],
            "half": pa.array(np.array([1, 0.5, 2], np.float16)),
            "single": pa.array([0.1, None, float("inf")], pa.float32()),
            "nothing": pa.nulls(3),
            "lists": [["a", "b"], [], None],
            "list of dictionary": pa.array([["a"], ["b"], None], pa.list_(pa.dictionary(pa.int32(), pa.string()))) if suffix != ".feather" else [["a"], ["b"], None],
        }
    )  # fmt: skip
    found = {name: column.to_pylist() for name, column in columns_of(table, tmp_path, suffix).columns.items()}
    assert found == {
        "dictionary": ["a", "b", "a"], "large": ["a", None, "c"], "view": ["a", None, "c"],
        "unsigned": [str(2**64 - 1), "7", None], "binary": ["a", "ü", None],
        "whole": [str(10**30), None, "5"], "decimal": [1.5, None, 5.0], "date": ["2024-01-02", None, None],
        "time": ["2024-01-02 03:00:00.000000", None, None], "bool": [True, None, False], "half": [1.0, 0.5, 2.0],
        "single": [0.1, None, float("inf")],
        "nothing": [None] * 3, "lists": [["a", "b"], [], None], "list of dictionary": [["a"], ["b"], None],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[["a"]], [["b"]]], "is of type list<"),
        ([{"x": "a"}, {"x": "b"}], "is of type struct"),
        ([[{"x": "a"}], []], "is of type struct"),
        ([b"a", b"\xff\xfe"], "row 2: column `c` holds bytes that are not UTF-8"),
    ],
)
def test_columnar_types_that_are_no_text_and_no_label(tmp_path: Path, values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        columns_of(pa.table({"c": values}), tmp_path)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    assert distinct(["a", "b", "a", "a.1", "a"]) == ["a", "b", "a.2", "a.1", "a.3"]
    path = tmp_path / "a.csv"
    path.write_text("text,n,n\nhello there,1,2\n")
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.table([["hello there"], ["1"], ["2"]], names=["text", "n", "n"]), parquet)
    for file in (path, parquet):
        table = next(read_chunks(examine([file], ["text"], None, 9), [file], {0})).table
        assert table.to_pylist() == [{"text": "hello there", "n": "1", "n.1": "2"}]
        with pytest.raises(DataError, match="column `n` occurs twice"):
            examine([file], ["n"], None, 9)
        with pytest.raises(DataError, match="column `n` occurs twice"):
            read_files([file], ["n"])


# -- folders -----------------------------------------------------------------------------------------------------------


def files_of(path: Path) -> dict[str, list[str]]:
    return {
        split: [str(p.relative_to(path)) for p in paths]
        for split, paths in find_files({"all": (str(path),)}, path).items()
    }


def test_partitions_are_columns(tmp_path: Path) -> None:
    for label, texts in (("good one", ["a b", "c d"]), ("bad", ["e f"])):
        folder = tmp_path / "data" / f"label={label.replace(' ', '%20')}" / "year=2024"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"text": texts}), folder / "part-0.parquet")
    (paths,) = find_files({"all": (str(tmp_path / "data"),)}, tmp_path).values()
    table = read_files(paths, ["label"], ["text"])
    assert table.columns["label"].to_pylist() == ["bad", "good one", "good one"]
    assert partitions(paths[0]) == {"label": "bad", "year": "2024"}
    assert [row["label"] for path in paths for row in read_rows(path)] == ["bad", "good one", "good one"]
    chunk = next(read_chunks(examine(paths, ["text"], None, 9), paths, {0}))
    assert chunk.table.column("year").to_pylist() == ["2024"] * 3
    for name, content in (("a.csv", "text\na b\n"), ("a.jsonl", '{"text": "a b"}\n')):
        path = paths[0].with_name(name)
        path.write_text(content)
        assert read_files([path], ["label"]).columns["label"].to_pylist() == ["bad"]


def test_folders_of_splits_and_of_save_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "by folder"
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        (folder / split / "0.csv.gz").write_bytes(gzip.compress(csv_text().encode()))
    assert files_of(folder) == {"train": ["train/0.csv.gz"], "eval": ["validation/0.csv.gz"]}
    with pytest.raises(DataError, match="holds several splits: eval, train"):
        find_files({"train": (str(folder),)}, folder)
    (folder / "clone").mkdir()
    shutil.copytree(folder / "train", folder / "clone" / "data")
    (folder / "clone/data/0.csv.gz").rename(folder / "clone/data/train-00000-of-00001.csv.gz")
    assert files_of(folder / "clone") == {"train": ["data/train-00000-of-00001.csv.gz"]}
    assert split_of(Path("train.csv.gz")) == "train" and format_of(Path("a.parquet.gz")) is None

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    saved = datasets.Dataset.from_list(RECORDS, features=features)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "both")
    assert list(files_of(tmp_path / "one")) == ["all"]
    assert {k: len(v) for k, v in files_of(tmp_path / "both").items()} == {"train": 1, "test": 1}
    (paths,) = find_files({"train": (str(tmp_path / "one"),)}, tmp_path).values()
    table = read_files(paths, ["label"], ["text"])
    assert table.columns["label"].to_pylist() == [v for _, v in ROWS] and table.classes == {"label": ("neg", "pos")}
    assert [(row["text"], row["label"]) for path in paths for row in read_rows(path)] == ROWS
    with pytest.raises(DataError, match="holds several splits: test, train") as error:
        find_files({"train": (str(tmp_path / "both"),)}, tmp_path)
    assert "both/test" in error.value.remedy
    state = json.loads((tmp_path / "one/state.json").read_text())
    (tmp_path / "one/state.json").write_text(
        json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]})
    )
    with pytest.raises(DataError, match="saved a selection of rows"):
        find_files({"train": (str(tmp_path / "one"),)}, tmp_path)
    (tmp_path / "one/state.json").write_text(json.dumps(state))
    paths[1].unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow is missing"):
        find_files({"train": (str(tmp_path / "one"),)}, tmp_path)


# -- options take effect or are refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [("delimiter", ";"), ("header", False), ("quoting", "none"), ("encoding", "cp1252"), ("field", "a")])  # fmt: skip
def test_an_option_that_no_file_can_use_is_refused(key: str, value: Any) -> None:
    reading = ReadOptions(**{key: value})
    with pytest.raises(InputError, match=f"data.{key}: is for .* files, and there is none here"):
        reading.check_used([Path("a.parquet")], "data.{}".format)
    reading.check_used([Path("a.parquet"), Path("b.jsonl" if key == "field" else "b.csv.gz")], "data.{}".format)


def test_unset_options_are_in_no_digest(tmp_path: Path) -> None:
    data = {"files": {"all": "a.csv"}, "text": "text", "label": "label"}

    def plain(**more: Any) -> dict[str, Any]:
        return Data.model_validate({**data, **more}).digested()

    assert not plain().keys() & ReadOptions.model_fields.keys()
    assert plain(encoding="CP1252", header=False).items() >= {"encoding": "cp1252", "header": False}.items()
    assert Data.model_validate(plain(header=["a", "b"])).reading.header == ("a", "b")
