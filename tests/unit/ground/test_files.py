"""Files: JSON objects, words, names aside, atomic writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from afina.errors import EnvironmentProblem
from afina.files import (
    append_line,
    encode_words,
    name_aside,
    nearest_path,
    read_json,
    read_words,
    write_atomic,
    write_problem,
)
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
    assert [plural(n, "row has", "rows have") for n in (0, 1, 2)] == ["0 rows have", "1 row has", "2 rows have"]
    assert aligned([["a", "bc", ""], ["def", "g", "h"]], right=[1]) == ["a    bc", "def   g  h"]


def test_a_line_is_appended_as_a_whole_and_a_torn_one_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "log"
    assert append_line(file, "one") == append_line(file, "two") == 0
    with file.open("a") as torn:
        torn.write('{"step": 3, "lo')
    assert append_line(file, "four") == 15
    assert file.read_text() == "one\ntwo\nfour\n"
    file.write_text("torn")
    assert append_line(file, "é") == 4 and file.read_text() == "é\n"


def test_nothing_of_a_line_that_does_not_fit_stays(tmp_path: Path) -> None:
    """A limit on the size of files cuts a write short, as a full disk does."""
    code = (
        "import resource, sys; from pathlib import Path; from afina.files import append_line\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); file = Path(sys.argv[1])\n"
        "append_line(file, 'x' * 60); append_line(file, 'y' * 60)\n"
    )
    file = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr and file.read_text() == "x" * 60 + "\n"


def test_a_file_that_cannot_be_written_names_the_reason_that_it_has(tmp_path: Path) -> None:
    """A folder that was removed is not a full disk."""
    with pytest.raises(EnvironmentProblem, match=r"outcome\.json: No such file or directory") as gone:
        write_atomic(tmp_path / "run" / "outcome.json", "{}")
    assert f"{tmp_path / 'run'} is gone: put it back" in gone.value.remedy
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="Not a directory") as blocked:
        write_atomic(tmp_path / "file" / "outcome.json", "{}")
    assert "is gone" in blocked.value.remedy
    for number, remedy in ((errno.EROFS, "permissions of the folder"), (errno.EDQUOT, "free space or quota")):
        assert remedy in write_problem(tmp_path / "a", OSError(number, os.strerror(number))).remedy


def test_write_atomic_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    write_atomic(path, "one ☃")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.glob(".*")) == []


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "x").write_text("")
    with pytest.raises(EnvironmentProblem):  # a folder is in the way of os.replace
        write_atomic(folder / "full", "data")
    assert list(folder.iterdir()) == [folder / "full"]
    for absent in (folder / "not there" / "x", folder / "full" / "x" / "y"):
        with pytest.raises(EnvironmentProblem) as caught:
            write_atomic(absent, "data")
        assert caught.value.message.startswith(f"{absent}: ")


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path, size, stop = tmp_path / "f", 300_000, threading.Event()
    write_atomic(path, b"0" * size)

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            write_atomic(path, str(turn % 10).encode() * size)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(50):
            raw = path.read_bytes()
            assert len(raw) == size and len(set(raw)) == 1
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert path.exists() and not list(tmp_path.glob(".f*"))


def test_what_is_not_there_is_told_by_the_names_beside_it_or_by_its_link(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").touch()
    (tmp_path / "moved.csv").symlink_to("/gone/moved.csv")
    assert nearest_path(tmp_path / "review.csv") == "did you mean `reviews.csv`?"
    assert nearest_path(tmp_path / "moved.csv").startswith("it is a link to /gone/moved.csv, and there is nothing")
    assert nearest_path(tmp_path / "no folder/a") == nearest_path(tmp_path / "zzz") == ""
