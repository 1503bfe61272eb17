"""record.json: overrides that give the recipe back, git in every state, an image that is read once, and no secrets."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import ROOT
from tests.unit.conftest import recipe_dict, tree

from afina.recipe.parse import load_recipe, parse_recipe
from afina.recipe.schema import Recipe
from afina.redact import redact_comments
from afina.run.new_run import claim
from afina.run.plan import make_plan
from afina.run.provenance import git
from afina.run.provenance.git import repository_state
from afina.run.provenance.record import differences, image_record, make_record, overrides_of, read_record
from afina.site import pulled
from afina.site.settings import Site

RecipeFile = Callable[..., Path]

SETS = [
    [],
    ["train.learning_rate=3e-5"],
    ["train.learning_rate=1e-7", "train.epochs=0.5", 'name="é ☃: x"'],
    ["train.epochs=null", "train.max_steps=7", "train.save_minutes=null"],
    ["train.arguments={}"],
    ["train.arguments={warmup_steps: 0.1, lr_scheduler_type: cosine, adam_epsilon: 1.0e-08}"],
    ["metrics=[mcc, accuracy]", "data.files={train: a.csv, eval: [b.csv, 'c d.csv']}", "data.train={}", "data.eval={}"],
    ["data.label=[a, b]", "data.labels=[a, b]", "metrics=null", "task=multi-label"],
    ["resources.time=1-2:30", "resources.nodes=2", "train.batch_size=16"],
    ["model='123'", "data.text=no", "data.id='2024'", "data.label='null'"],
]


@pytest.mark.parametrize("sets", SETS, ids=[" ".join(s)[:60] or "none" for s in SETS])
def test_overrides_give_back_the_recipe_that_was_run(recipe_file: RecipeFile, sets: list[str]) -> None:
    file = recipe_file()
    wanted = load_recipe(file, sets)
    lines = overrides_of(file.read_text(), wanted)
    assert lines is not None and parse_recipe(file.read_text(), lines) == wanted
    assert bool(lines) == bool(sets), "nothing is set that need not be"
    assert len(lines) <= 7


def test_overrides_of_a_text_that_is_no_recipe_without_them(recipe_file: RecipeFile) -> None:
    wanted = load_recipe(recipe_file())
    text = recipe_file(name="<drop this key>", model="<drop this key>").read_text()
    lines = overrides_of(text, wanted)
    assert lines is not None and parse_recipe(text, lines) == wanted
    assert overrides_of("- not: a mapping", wanted) is None


@pytest.mark.parametrize("file", sorted((ROOT / "slurm/recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_the_recipes_of_the_house_need_no_overrides(file: Path) -> None:
    assert overrides_of(file.read_text(), load_recipe(file)) == []


def _git(folder: Path, *words: str) -> str:
    identity = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", "-C", str(folder), *words], env={**os.environ, **identity}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a nasty name, a recipe in a folder of it, committed."""
    root = tmp_path / "re po, 'mine' $(touch pwned)"
    (root / "recipes").mkdir(parents=True)
    (root / "recipes/my recipe.yaml").write_text(json.dumps(recipe_dict()))
    (root / "code.py").write_text("one = 1\n")
    (root / "site.env").write_text("SBATCH_ACCOUNT=nobody\n")
    _git(root, "init", "-q", "-b", "main")
    _git(root, "add", ".")
    _git(root, "commit", "-qm", "first")
    return root


def test_a_clean_repository(repository: Path) -> None:
    before = tree(repository)
    state = repository_state(repository / "recipes/my recipe.yaml")
    assert tree(repository) == before, "looking changes nothing, not even the index"
    assert state["commit"] == _git(repository, "rev-parse", "HEAD") and state["branch"] == "main"
    assert (state["recipe"], state["changed"], state["untracked"], state["diff"]) == ("unchanged", [], 0, "")


def test_what_was_changed_since_the_commit(repository: Path) -> None:
    (repository / "code.py").write_text("two = 2\n")
    (repository / "site.env").write_text("SBATCH_ACCOUNT=my-secret-project\n")
    (repository / "more.txt").write_text("untracked\n")
    state = repository_state(repository / "recipes/my recipe.yaml")
    assert sorted(state["changed"]) == ["code.py", "site.env"] and state["untracked"] == 1
    assert "-one = 1" in state["diff"] and "+two = 2" in state["diff"]
    assert "my-secret-project" not in state["diff"], "files that name an account are left out"
    assert state["recipe"] == "unchanged" and state["diff_cut"] is False
    other = repository_state(repository / "recipes/my recipe.yaml")
    assert other["diff_sha256"] == state["diff_sha256"]


def test_an_untracked_recipe_is_in_the_difference(repository: Path) -> None:
    new = repository / "recipes/it's new.yaml"
    new.write_text("name: brand new\n")
    state = repository_state(new)
    assert state["recipe"] == "untracked" and "+name: brand new" in state["diff"]
    (repository / "recipes/my recipe.yaml").write_text("name: changed\n")
    assert repository_state(repository / "recipes/my recipe.yaml")["recipe"] == "changed"


def test_secrets_are_redacted_and_a_large_difference_is_cut(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789secretsecret")
    (repository / "code.py").write_text("key = '0123456789secretsecret'\nurl = 'https://me:password@host/x'\n")
    state = repository_state(repository / "recipes/my recipe.yaml")
    assert "secretsecret" not in state["diff"] and "me:password" not in state["diff"] and "***" in state["diff"]
    others = f"API_KEY = 'abcdef987'\ngh = 'ghp_{'a1' * 15}'\n-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n"
    (repository / "code.py").write_text(others)
    diff = repository_state(repository / "recipes/my recipe.yaml")["diff"]
    assert not [secret for secret in ("abcdef987", "ghp_", "MIIabc") if secret in diff]
    (repository / "code.py").write_text("x\n" * 3_000_000)
    state = repository_state(repository / "recipes/my recipe.yaml")
    assert state["diff_cut"] and len(state["diff"]) <= git.MOST_BYTES and state["diff_sha256"] is None


def test_a_hooks_variables_and_hostile_settings_change_nothing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", f"touch {tmp_path}/pwned")
    (repository / ".gitattributes").write_text("*.py diff=evil\n")
    with (repository / ".git/config").open("a") as config:
        config.write(
            f'[diff "evil"]\n\ttextconv = touch {tmp_path}/pwned\n[core]\n\tfsmonitor = touch {tmp_path}/pwned\n'
        )
    (repository / "code.py").write_text("two = 2\n")
    state = repository_state(repository / "recipes/my recipe.yaml")
    assert "+two = 2" in state["diff"] and not (tmp_path / "pwned").exists()


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repository_state(tmp_path / "r.yaml") == {"none": "the recipe is in no git repository"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert repository_state(tmp_path / "r.yaml") == {"none": "git is not installed here"}


def test_a_repository_without_a_commit(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "r.yaml").write_text("name: x\n")
    state = repository_state(tmp_path / "r.yaml")
    assert state["commit"] is None and state["recipe"] == "untracked" and "+name: x" in state["diff"]


@pytest.fixture
def imaged(scratch: Path, sif: Path) -> Site:
    return Site(scratch=scratch, image=sif, runtime="apptainer")


def test_an_image_is_read_once(imaged: Site, sif: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pulled, "_REPORT_FROM_BYTES", 1)
    expected = hashlib.sha256(sif.read_bytes()).hexdigest()
    first = image_record(imaged, said.append)
    assert first == {"path": str(sif), "size": sif.stat().st_size, "sha256": expected} and len(said) == 1
    assert image_record(imaged, said.append) == first and len(said) == 1, "the second time it is known"
    before = sif.stat()
    sif.write_bytes(sif.read_bytes()[:-1] + b"x")
    os.utime(sif, ns=(before.st_atime_ns, before.st_mtime_ns))
    altered = image_record(imaged, said.append)
    assert altered is not None and altered["sha256"] != expected and len(said) == 2, (
        "size and time as before, and yet another"
    )


def test_an_image_that_cannot_be_read_or_remembered(imaged: Site, sif: Path) -> None:
    (imaged.scratch / "cache").write_text("in the way")
    found = image_record(imaged)
    assert found is not None and found["sha256"]
    sif.unlink()
    found = image_record(imaged)
    assert found is not None and found["sha256"] is None and "No such file" in found["none"]
    assert image_record(imaged.model_copy(update={"runtime": "none"})) is None


def test_the_record_goes_into_the_run_directory(
    recipe_file: RecipeFile, site: Site, tmp_path: Path, model_folder: Path, repository: Path
) -> None:
    file = repository / "recipes/my recipe.yaml"
    (repository / "recipes/reviews.csv").write_text("text,stars\na,1\n")
    file.write_text(json.dumps(recipe_dict(model=str(model_folder))))
    (repository / "code.py").write_text("account = 'my-project'\n")
    loaded: Recipe = load_recipe(file, ["train.epochs=2"])
    account = site.model_copy(update={"sbatch": {"SBATCH_ACCOUNT": "my-project"}})
    plan = make_plan(loaded, account, recipe_file=file)
    prepared: dict[str, Any] = {"digest": "d" * 64, "model_commit": "c" * 40, "data_commit": None}
    made = make_record(plan, prepared, file.read_text(), None)
    run = claim(plan, prepared, ["true"], file.read_text(), tmp_path / "run", record=made)
    kept = read_record(run.path)
    assert kept == json.loads(json.dumps(made))
    assert kept["recipe"]["overrides"] == ["train.epochs=2.0"] and kept["recipe"]["file"] == str(file)
    assert kept["git"]["recipe"] == "changed" and kept["model"]["commit"] == "c" * 40
    assert "my-project" not in (run.path / "record.json").read_text(), "the account stays at home"


def test_the_recipes_comments_are_redacted_and_its_keys_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "reviews")
    text = "name: reviews  # password: hunter22, reviews\nmodel: x # hf_" + "a" * 20 + "\n"
    assert redact_comments(text) == "name: reviews  # password: ***, ***\nmodel: x # ***\n"


def test_differences_between_records() -> None:
    old: dict[str, Any] = {
        "afina": "0.1.0",
        "image": {"sha256": "a" * 64},
        "git": {"commit": "b" * 40, "diff_sha256": "1"},
        "model": {"files": {"config.json": {"size": 1}}},
    }
    assert differences(old, old) == []
    new = {
        **old,
        "afina": "0.2.0",
        "image": {"sha256": "f" * 64},
        "git": {"commit": None},
        "model": {"files": {"config.json": {"size": 2}}},
    }
    assert differences(old, new) == [
        "afina: 0.1.0 then, 0.2.0 now",
        "image: aaaaaaaaaaaa then, ffffffffffff now",
        "model files: config.json",
    ]
    assert differences({}, new) == []


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_damaged_record_is_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    assert read_record(tmp_path) == {} and read_record(tmp_path / "absent") == {}
