"""JSON objects, words and names aside; atomic writes are tested with run directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from afina.files import encode_words, name_aside, read_json, read_words
from afina.text import aligned, minutes_in_words, plural, seconds_in_words


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff", None])
def test_a_json_file_that_holds_no_object_is_an_empty_one(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json(path) == {}
    path.write_text('{"ä": [1]}', encoding="utf-8")
    assert read_json(path) == {"ä": [1]}


def test_words_come_back_whatever_they_hold(tmp_path: Path) -> None:
    words = ["", "it's", "a b\nc", "$HOME; `x`", "ünï", "\udcff"]
    (tmp_path / "words").write_bytes(encode_words(words))
    assert read_words(tmp_path / "words") == words


def test_names_aside_differ_and_lie_beside(tmp_path: Path) -> None:
    names = {name_aside(tmp_path / "model") for _ in range(100)}
    assert len(names) == 100 and all(n.parent == tmp_path and n.name.startswith(".model.") for n in names)


def test_numbers_and_tables_in_words() -> None:
    assert [seconds_in_words(s) for s in (4.6, 119, 120, 7199, 7200)] == ["5 s", "119 s", "2 min", "2 h", "2 h"]
    assert minutes_in_words(4331) == "3 days 11 min"
    assert [plural(n, "run") for n in (0, 1, 2000)] == ["0 runs", "1 run", "2,000 runs"]
    assert aligned([["a", "bc", ""], ["def", "g", "h"]], right=[1]) == ["a    bc", "def   g  h"]
