"""`afina init` reads a file as a spreadsheet has written it, and writes that into the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.unit.data.stage import prepare_here
from tests.unit.start.conftest import Init

from afina.api import plan_for
from afina.cli.start_commands import init as init_command
from afina.errors import DataError
from afina.recipe.parse import load_recipe


def _write(path: Path, encoding: str, mark: str) -> Path:
    rows = [f'"a text, number {n}"{mark}schön {n % 5}' for n in range(40)]
    path.write_bytes("\r\n".join([f"Text{mark}Urteil", *rows, ""]).encode(encoding))
    return path


@pytest.mark.parametrize(
    ("encoding", "mark", "guessed"),
    [
        ("utf-8", ";", {"delimiter": ";"}),
        ("utf-16", "\t", {"encoding": "utf-16", "delimiter": "\t"}),
        ("utf-16-le", ";", {"encoding": "utf-16-le", "delimiter": ";"}),
        ("utf-32", ",", {"encoding": "utf-32"}),
        ("utf-8-sig", ",", {}),
    ],
)
def test_what_is_certain_is_taken(
    init: Init, tmp_path: Path, model: Path, encoding: str, mark: str, guessed: dict[str, str]
) -> None:
    data = _write(tmp_path / "Käufer.csv", encoding, mark)
    answer = init(tmp_path / "p", "--data", data, "--model", model)
    assert answer["recipe"].data.reading.given() == guessed
    assert answer["recipe"].data.label == ("Urteil",) and len(answer["labels"]) == 5 and "schön 0" in answer["labels"]
    assert ("seems to be separated by" in answer["text"]) == ("delimiter" in guessed)
    assert ("starts as such files do" in answer["text"]) == ("encoding" in guessed)
    assert sum(prepare_here(plan_for(tmp_path / "p/recipe.yaml"))["rows"].values()) == 40


def test_what_is_likely_is_asked_about(no_cluster: Path, tmp_path: Path, scratch: Path, model: Path) -> None:
    data = _write(tmp_path / "r.csv", "cp1252", ";")
    argv = ["--data", str(data), "--model", str(model), "--name", "n", "--scratch", str(scratch)]
    done = CliRunner().invoke(init_command, [str(tmp_path / "p"), *argv], input="\ny\n\n\n")
    assert done.exit_code == 0, done.output
    assert "its bytes are as in Windows-1252. Read it with encoding cp1252 [Y/n]" in done.stderr
    assert "separated by `;`. Read it with delimiter ';' [Y/n]" in done.stderr
    recipe = load_recipe(tmp_path / "p/recipe.yaml")
    assert recipe.data.reading.given() == {"encoding": "cp1252", "delimiter": ";"}
    for more, answers in (([], "n\n"), (["--yes"], None)):
        done = CliRunner().invoke(init_command, [str(tmp_path / "q"), *argv, *more], input=answers)
        assert isinstance(done.exception, DataError) and "--encoding cp1252" in done.exception.remedy
    assert not (tmp_path / "q/recipe.yaml").exists()
