"""Bad input, line by line: one message with a remedy, exit code 2 or 3, no traceback, nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_model
from tests.unit.conftest import Ran, tree

from afina.recipe.parse import load_recipe
from afina.run.new_run import claim
from afina.run.plan import make_plan
from afina.site.settings import Site


def only_message(done: Ran, code: int, *parts: str) -> None:
    assert done.returncode == code, done
    assert done.stdout == "", done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("error: ") == 1, done.stderr
    assert done.stderr.count("\n  remedy: ") == 1 and len(done.stderr.splitlines()) == 2, done.stderr
    assert "Traceback" not in done.stderr and "pydantic" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


Case = tuple[dict[str, Any], list[str], dict[str, str | None], int, tuple[str, ...]]

CASES: dict[str, Case] = {
    "wrong recipe key": (
        {"train__learning_rte": 1e-4},
        [],
        {},
        2,
        ("recipe.yaml:", "unknown key `train.learning_rte`", "did you mean `learning_rate`?"),
    ),
    "wrong type": ({"train__batch_size": "eight"}, [], {}, 2, ("`train.batch_size`: must be a whole number, found 'eight'",)),
    "wrong type in --set": ({}, ["--set", "train.epochs=many"], {}, 2, ("--set train.epochs: must be a number, found 'many'",)),
    "unknown --set": ({}, ["--set", "tran.epochs=1"], {}, 2, ("--set tran.epochs: unknown key `tran`", "`train`")),
    "no such data file": ({"data__files": {"all": "review.csv"}}, [], {}, 2, ("review.csv: no such file", "did you mean `reviews.csv`?")),
    "unknown format": ({"data__files": {"all": "recipe.yaml"}}, [], {}, 2, ("format .yaml is not known", "known formats: .csv")),
    "no such model folder": ({"model": "./my-model"}, [], {}, 2, ("my-model: no such folder",)),
    "a path that is too long": ({"model": "./" + "x" * 300}, [], {}, 3, ("File name too long",)),
    "a reserved argument": ({"train__arguments": {"fp16": True, "seed": 3}}, [], {}, 2, ("train.arguments.seed", "set `train.seed`")),
    "scratch not set": ({}, [], {"AFINA_SCRATCH": None}, 3, ("AFINA_SCRATCH is not set", "slurm/site.example.env")),
    "scratch missing": ({}, [], {"AFINA_SCRATCH": "/not/there"}, 3, ("AFINA_SCRATCH=/not/there does not exist", "mkdir -p")),
    "no such site file": ({}, ["--site", "absent.env"], {}, 3, ("absent.env: no such file",)),
    "no such image": ({}, [], {"AFINA_IMAGE": "/no/afina.sif"}, 3, ("AFINA_IMAGE=/no/afina.sif: no such image", "container/build.sh")),
    "an unreadable image": ({}, [], {"AFINA_IMAGE": "/etc/passwd"}, 3, ("is not an Apptainer image (SIF)", "container/build.sh")),
    "an unknown runtime": ({}, [], {"AFINA_RUNTIME": "docker"}, 3, ("AFINA_RUNTIME=docker is not known", "one of: apptainer")),
    "a runtime without an image": ({}, [], {"AFINA_RUNTIME": "apptainer"}, 3, ("AFINA_RUNTIME=apptainer and no AFINA_IMAGE",)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_train(command: Callable[..., Ran], recipe_file: Callable[..., Path], tmp_path: Path, case: str) -> None:
    changes, options, env, code, parts = CASES[case]
    path = recipe_file(**changes)
    before = tree(tmp_path)
    only_message(command("train", path, *options, env=env), code, *parts)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("case", ["wrong recipe key", "scratch missing", "no such data file", "an unreadable image"])
@pytest.mark.parametrize("words", [["prefetch"], ["submit", "--dry-run"]], ids=lambda c: c[0])
def test_the_other_commands_say_the_same(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], tmp_path: Path, case: str, words: list[str]
) -> None:
    changes, options, env, code, parts = CASES[case]
    path = recipe_file(**changes)
    before = tree(tmp_path)
    only_message(command(*words, path, *options, env=env), code, *parts)
    assert tree(tmp_path) == before


def test_no_such_recipe(command: Callable[..., Ran], recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe_file()
    only_message(command("train", path.with_name("recipee.yaml")), 2, "no such file", f"did you mean `{path}`?")
    only_message(command("train", path.parent), 2, "is a folder")
    only_message(command("train", path.with_name("reviews.csv")), 2, "is a file of data", "afina init FOLDER --data")
    only_message(command("train", str(path) + "x" * 300), 2, "File name too long")


def test_a_batch_that_does_not_divide(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe_file(train__batch_size=9)
    before = tree(tmp_path)
    words = ("train.batch_size: 9 is the global batch and does not divide over 8 processes", "to 8 or 16")
    only_message(command("submit", path, "--dry-run", "--nodes", "2", "--gpus-per-node", "4"), 2, *words)
    if len(os.sched_getaffinity(0)) > 1:
        only_message(
            command("train", path, "--num-processes", "2"), 2, "does not divide over 2 processes", "to 8 or 10"
        )
    assert tree(tmp_path) == before


def test_more_processes_than_cores(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    cores, path = len(os.sched_getaffinity(0)), recipe_file()
    before = tree(tmp_path)
    done = command("train", path, "--num-processes", str(cores + 1))
    only_message(done, 2, f"{cores + 1} processes on {cores} cores", f"use --num-processes {cores} or fewer")
    assert tree(tmp_path) == before


def test_a_run_directory_that_is_in_use(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], site: Site, tmp_path: Path
) -> None:
    path = recipe_file()
    run = claim(make_plan(load_recipe(path), site, recipe_file=path), {}, ["x"], "", tmp_path / "my run")
    before = tree(tmp_path)
    remedy = f"continue it with `afina resume '{run.path}'`"
    only_message(
        command("train", path, "--run", run.path),
        2,
        f"error: {run.path}: this run directory is already claimed",
        remedy,
    )
    for other in (path.parent, path):
        only_message(command("train", path, "--run", other), 2, "exists, and is not an empty folder")
    assert tree(tmp_path) == before


# -- what only the prepare stage can see -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def left_behind(scratch: Path, before: dict[str, str]) -> list[str]:
    """New files and folders under scratch, caches of the libraries apart."""
    return [p for p in tree(scratch) if p not in before and f"{scratch}/cache" not in p and not p.endswith(".lock")]


@pytest.mark.slow
def test_no_such_column(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], scratch: Path, tiny: Path, tmp_path: Path
) -> None:
    before = tree(scratch)
    run = tmp_path / "never made"
    done = command("train", recipe_file(model=str(tiny), data__label="star"), "--run", run)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("remedy: ") == 1, done
    assert "star" in done.stderr and "reviews.csv" in done.stderr and "did you mean `stars`?" in done.stderr
    assert not run.exists() and [p for p in left_behind(scratch, before) if "runs" in p] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "reviews.csv"),
        (b"text,stars\n", "reviews.csv"),
        (b"text,stars\ncaf\xe9,1\ngood,5\n", "reviews.csv"),
        (b"\0\0\0\0\0", "reviews.csv"),
    ],
    ids=["empty", "header only", "not UTF-8", "binary"],
)
def test_data_that_cannot_be_read(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], scratch: Path, tiny: Path, content: bytes, says: str
) -> None:
    path = recipe_file(model=str(tiny))
    (path.parent / "reviews.csv").write_bytes(content)
    done = command("prefetch", path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("remedy: ") == 1, done
    assert says in done.stderr
