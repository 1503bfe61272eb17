"""One strict reader of CSV, TSV and JSON Lines: training, prediction and init report the same error for the same file."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from afina.errors import DataError
from afina.formats.delimited import read_delimited
from afina.formats.json_rows import number_text, read_json
from afina.formats.rows import read_rows
from afina.worker.data.tables.data_table import read_files
from afina.worker.predicting.inputs import examine

#: File, content, message after the path, remedy.
BROKEN: dict[str, tuple[str, bytes, str, str]] = {
    "short row": ("a.csv", b"text,n\n\na,1\nb\n", r", row 2 \(line 4\): 1 cell, the header has 2", "quote the cell"),
    "long row": ("a.csv", b'text,n\n"a\nb",1\nc, d,2\n', r", row 2 \(line 4\): 3 cells, the header has 2", "like, this"),
    "rows that end with a separator": ("a.csv", b"text,n\na,1,\nb,2,\n", r", row 1 \(line 2\): 3 cells, the header has 2", "end the header with one too (`text,n,`)"),
    "a comment first": ("a.csv", b"# export\ntext,n\na,1\n", "", "remove it: the first line names the columns"),
    "semicolons and a comma": ("a.csv", b"text;n;no, not\na;1;b\n", "", "separated by `;`"),
    "a key twice": ("a.jsonl", b'{"text": "a"}\n{"text": "a", "n": 1, "n": 2}\n', ", line 2: `n` occurs twice in one object", "write each key once"),
    "open quote": ("a.tsv", b'text\tn\na\t1\n"b\t2\nc\t3', r", row 2: a quote \(\"\) is opened and never closed", "close it"),
    "odd quote": ("a.csv", b'text,n\n"a" b,1\n', r", row 1 \(line 2\): text follows a closing quote", "double each quote"),
    "latin": ("a.csv", b'text,n\n"a\nb",1\ncaf\xe9,2\n', r", row 2 \(line 4\): byte 0xe9 at offset 18 is not UTF-8", "save the file as UTF-8"),
    "latin header": ("a.csv", b"t\xe9xt,n\na,1\n", r", the header: byte 0xe9 at offset 1 is not UTF-8", "UTF-8"),
    "latin lines": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r", line 2: byte 0xe9 at offset 24 is not UTF-8", "UTF-8"),
    "UTF-16": ("a.csv", "text\na\n".encode("utf-16"), ": the file is UTF-16", "`data.encoding: utf-16` in a recipe, --encoding utf-16"),
    "UTF-16 lines": ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), ": the file is UTF-16", "`data.encoding: utf-16` in a recipe, --encoding utf-16"),
    "empty": ("a.csv", b"\n\n", ": the file is empty", "names the columns"),
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', ", line 3: not valid JSON: ", "one complete object on each line"),
    "JSON over lines": ("a.json", b'{\n "text": "a",\n}\n', ", line 3: not valid JSON: ", "one object per line"),
    "NUL": ("a.csv", b"text,n\na\0,1\n", ", line 2: holds a NUL byte", "remove it"),
    "UTF-16 without a mark": ("a.csv", "text\na\n".encode("utf-16-le"), ", line 1: holds a NUL byte", "--encoding utf-16-le"),
    "UTF-16 backwards": ("a.tsv", "text\na\n".encode("utf-16-be"), ", line 1: holds a NUL byte", "--encoding utf-16-be"),
    "UTF-16 lines without a mark": ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), ", line 1: holds a NUL byte", "--encoding utf-16-le"),
    "UTF-16 that is no UTF-8": ("a.csv", "text\nè\n".encode("utf-16-le"), ": holds NUL bytes", "--encoding utf-16-le"),
    "UTF-16 backwards that is no UTF-8": ("a.jsonl", '{"text": "è"}\n'.encode("utf-16-be"), ": holds NUL bytes", "--encoding utf-16-be"),
    "UTF-32": ("a.csv", "text\na\n".encode("utf-32"), ": the file is UTF-32", "--encoding utf-32"),
    "Cyrillic": ("a.csv", "text\nочень хорошо\n".encode("cp1251"), r", row 1 \(line 2\): byte 0xee", "--encoding ITS_ENCODING"),
    "Chinese": ("a.csv", "text\n这本书\n".encode("gb18030"), r", row 1 \(line 2\): byte 0x", "--encoding ITS_ENCODING"),
    "Git LFS": ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ": is a pointer of Git LFS", "git lfs pull"),
    "Git LFS as Parquet": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ": is a pointer of Git LFS", "git lfs pull"),
    "a web page": ("a.jsonl", b"<!DOCTYPE html>\n<html></html>", ": is a web page", "download the file itself"),
    "JSON as CSV": ("a.csv", b'{"text": "a"}\n', ": is JSON", "name it .jsonl"),
    "NUL in lines": ("a.jsonl", b'{"text": "a"}\n\0\0\0', ", line 2: not valid JSON", "correct that line"),
    "cp1252": ("a.csv", b"text\nit\x92s\n", r", row 1 \(line 2\): byte 0x92 at offset 7", "`data.encoding: cp1252` in a recipe, --encoding cp1252"),
    "not cp1252": ("a.csv", "text\nопЅ\n".encode("cp1251") + b"\x90", r", row 1 \(line 2\): byte 0x..", "--encoding ITS_ENCODING"),
    "UTF-8 with a wrong byte": ("a.csv", "text\nüäö\n\xe9".encode() + b"\xe9\n", r", row 2 \(line 3\): byte 0xe9", "other letters in it are UTF-8"),
    "Excel's line": ("a.csv", b"sep=;\ntext;n\n", ": the first line, `sep=;`, is one that only Excel knows", "--delimiter ';'"),
    "records under a key": ("a.json", b'{"v": 1, "data": [{"text": "a"}, {"text": "b"}]}', ": one object, with records under `data`", "--field data"),
    "rows of lists": ("a.json", b'[["a", 1], ["b", 2]]', ", record 1: a JSON object is expected, found a list", "orient='records'"),
    "truncated gzip": ("a.csv.gz", gzip.compress(b"text\n" + bytes(range(97, 123)) * 99)[:-20], ": cannot be unpacked as gzip", "again"),
    "no gzip": ("a.csv.gz", b"text\na\n", ": is not gzip, its name says .gz", "without .gz"),
    "no zstd": ("a.jsonl.zst", b'{"text": "a"}\n', ": is not zstd, its name says .zst", "without .zst"),
    "no xz": ("a.tsv.xz", b"text\na\n", ": is not xz, its name says .xz", "without .xz"),
    "no object": ("a.jsonl", b'{"text": "a"}\n[1]\n', ", line 2: a JSON object is expected, found a list", "one object per line"),
    "no object in an array": ("a.json", b'[{"text": "a"}, 3]', ", record 2: a JSON object is expected, found a number", "one object"),
    "deep": ("a.jsonl", b'{"text": 1}\n{"text": ' + b"[" * 99999, ", line 2: lists or objects are nested too deeply", "correct that line"),
    "deep array": ("a.json", b"[" * 99999, ": lists or objects are nested too deeply", "one object per line"),
    "long number": ("a.jsonl", b'{"text": ' + b"1" * 9999 + b"}", ", line 1: cannot be read: ", "correct that line"),
    "semicolons": ("a.csv", b"text;n\na;1\n", "", "--delimiter ';'"),
    "tabs": ("a.csv", b"text\tn\na\t1\n", "", "--delimiter tab"),
    **{
        f"{what} as {suffix}": (f"a{suffix}", start, f": is .*{what}.*, its name says {suffix}", remedy)
        for suffix in (".csv", ".jsonl")
        for start, what, remedy in [
            (b"\x1f\x8b\x08\x00\xff", "compressed with gzip", ".gz"),
            (b"PK\x03\x04\xff", "spreadsheet", "CSV UTF-8"),
            (b"PAR1\x15\x8e", "Parquet", "name it .parquet"),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_training_prediction_and_init_report_the_same_error(name: str, tmp_path: Path) -> None:
    file, raw, message, remedy = BROKEN[name]
    path = tmp_path / file
    path.write_bytes(raw)
    errors = []
    for read in (
        lambda: read_files([path], [], ["text"]),
        lambda: examine([path], ["text"], None, 10),
        lambda: list(read_rows(path)),
    ):
        with pytest.raises(DataError, match=f"{re.escape(str(path))}{message}") as refused:
            read()
        assert remedy in str(refused.value)
        errors.append(str(refused.value))
    assert len(set(errors)) == 1 or not message
    if not message and name in ("semicolons", "tabs"):
        mark = "`;`" if name == "semicolons" else "tab"
        assert all(f"seems to be separated by {mark}" in error for error in errors)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_rows_are_counted_as_an_editor_or_a_spreadsheet_counts_them(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(mark + 'text,n\r\n\r\n"zwei\nZeilen, schön",1\n\na,2'.encode())
    assert list(read_delimited(path)) == [(0, ["text", "n"]), (1, ["zwei\nZeilen, schön", "1"]), (2, ["a", "2"])]
    assert list(read_rows(path)) == [{"text": "zwei\nZeilen, schön", "n": "1"}, {"text": "a", "n": "2"}]
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(mark + b'{"a": 1}\n\n{"a": 2}')
    assert list(read_json(lines)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_numbers_as_texts() -> None:
    assert [number_text(v) for v in (1, 1.0, 2.5, 1e300, True, 2**70, float("nan"))] == [
        "1", "1", "2.5", "1e+300", "true", str(2**70), None
    ]  # fmt: skip
