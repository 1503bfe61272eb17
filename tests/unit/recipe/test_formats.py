"""One strict reader of CSV, TSV and JSON Lines: training, prediction and init report the same error for the same file."""

from __future__ import annotations

from pathlib import Path

import pytest

from afina.errors import DataError
from afina.recipe.formats import number_text, read_delimited, read_json, read_rows
from afina.worker.data.tables import read_files
from afina.worker.inference.inputs import examine

BROKEN: dict[str, tuple[str, bytes, str]] = {
    "ragged": ("a.csv", b"text,n\n\na,1\nb\n", r"row 2 \(line 4\): 1 cells, the header has 2"),
    "open quote": ("a.tsv", b'text\tn\na\t1\n"b\t2\n', r"row 2: a quote \(\"\) is opened and never closed"),
    "odd quote": ("a.csv", b'text,n\n"a" b,1\n', r"row 1 \(line 2\): text follows a closing quote"),
    "latin": ("a.csv", b'text,n\n"a\nb",1\ncaf\xe9,2\n', r"row 2 \(line 4\): byte 0xe9 at offset 18 is not UTF-8"),
    "latin header": ("a.csv", b"t\xe9xt,n\na,1\n", r"the header: byte 0xe9 at offset 1 is not UTF-8"),
    "latin lines": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2: byte 0xe9 at offset 24 is not UTF-8"),
    "UTF-16": ("a.csv", "text\na\n".encode("utf-16"), "the file is UTF-16"),
    "empty": ("a.csv", b"\n\n", "the file is empty"),
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', "line 3: not valid JSON: "),
    "no object": ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: a JSON object is expected, found a list"),
    "no object in an array": ("a.json", b'[{"text": "a"}, 3]', "record 2: a JSON object is expected, found a number"),
    "other separator": ("a.csv", b"text;n\na;1\n", ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_training_prediction_and_init_report_the_same_error(name: str, tmp_path: Path) -> None:
    file, raw, message = BROKEN[name]
    path = tmp_path / file
    path.write_bytes(raw)
    errors = []
    for read in (
        lambda: read_files([path], [], ["text"]),
        lambda: examine([path], ["text"], None, 10),
        lambda: list(read_rows(path)),
    ):
        with pytest.raises(DataError, match=f"{path}.*{message}") as refused:
            read()
        errors.append(refused.value)
    if message:
        assert len({str(error) for error in errors}) == 1
    else:
        assert all(
            "seems to be separated by `;`" in str(error) and "save .csv with commas" in str(error) for error in errors
        )


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
