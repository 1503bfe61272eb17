"""Completion in the shells themselves: bash, zsh and fish, each where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.conftest import Ran

from afina.cli.completion import recipe_keys
from afina.recipe.manual import key_rows

_BASH = """
eval "$(afina completion bash)"
COMP_WORDS=({words}); COMP_CWORD={last}
compopt() {{ [ "$1 $2" = "-o nospace" ] && echo NOSPACE; }}
_afina_completion afina
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
_ZSH = """
compdef() { :; }
compadd() { while [ $# -gt 0 ]; do case $1 in -S) [ -z "$2" ] && print NOSPACE; shift;; -a) shift; print -l -- ${(P)1};; esac; shift; done; }
_describe() { print -l -- ${${(P)3}%%:*}; }
_path_files() { print FILES; }
eval "$(afina completion zsh)"
words=(WORDS); CURRENT=$#words
_afina_completion
"""


def completed(shell: str, line: str, folder: Path) -> list[str]:
    """What the shell offers behind `line`, in which the last word is not finished."""
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin/afina"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m afina "$@"\n')
    program.chmod(0o755)
    words = [word or "''" for word in line.split(" ")]
    if shell == "bash":
        argv = ["bash", "--norc", "-c", _BASH.format(words=" ".join(words), last=len(words) - 1)]
    elif shell == "zsh":
        argv = ["zsh", "-f", "-c", _ZSH.replace("WORDS", " ".join(words))]
    else:
        argv = ["fish", "--no-config", "-c", f"afina completion fish | source; complete -C '{line}'"]
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "AFINA_SCRATCH": str(folder / "scratch")}
    env["HOME"] = str(folder)
    done = subprocess.run(argv, env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == "", done.stderr
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("runs/yelp-1a2b3c4d-1", "runs/amazon-5e6f-1"):
        (tmp_path / "scratch" / name).mkdir(parents=True)
        (tmp_path / "scratch" / name / "plan.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_options_runs_and_keys(folder: Path, shell: str) -> None:
    assert completed(shell, "afina su", folder) == ["submit"]
    assert "--columns" in completed(shell, "afina status --c", folder)
    assert completed(shell, "afina logs ye", folder) == ["yelp-1a2b3c4d-1"]
    keys = completed(shell, "afina train r.yaml --set train.lea", folder)
    assert [key for key in keys if key != "NOSPACE"] == ["train.learning_rate="]
    assert shell == "fish" or "NOSPACE" in keys
    assert "cancel" in completed(shell, "afina ", folder) and "claim" not in completed(shell, "afina ", folder)


def test_values_of_a_choice(folder: Path) -> None:
    assert completed("fish", "afina train r.yaml --set train.precision=b", folder) == ["train.precision=bf16"]


def test_a_shell_without_completion(command: Callable[..., Ran]) -> None:
    done = command("completion", env={"SHELL": "/bin/tcsh"})
    assert (
        done.returncode == 2
        and "tcsh: no completion for this shell" in done.stderr
        and "bash, zsh, fish" in done.stderr
    )
    assert command("completion", env={"SHELL": "/usr/bin/zsh"}).stdout.startswith("#compdef afina")


def test_the_manual_has_every_key_once(command: Callable[..., Ran]) -> None:
    rows = [row.key for row in key_rows()]
    assert sorted(rows) == sorted(key for key, _ in recipe_keys()) and len(set(rows)) == len(rows)
    text = command("recipe", "keys", "train.learning").stdout
    assert text.startswith("train.learning_rate  5e-5\n    the schedule is linear")
    assert all("](" not in row.meaning for row in key_rows())
