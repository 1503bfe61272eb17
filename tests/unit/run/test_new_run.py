"""Claiming a run directory: what it holds, its numbers, races, and no space."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.conftest import private_mounts, tree
from tests.unit.run.claimed import ARGV, claimed, mode

from afina.errors import ClaimedError, EnvironmentProblem, InputError
from afina.run.commands import sbatch_argv
from afina.run.directory import RunDir, is_run_dir
from afina.run.new_run import check_free, next_free
from afina.run.plan import Plan

# -- claiming ----------------------------------------------------------------------------------------------------------


def test_a_claimed_directory_holds_what_the_run_is(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "above" / "r un")
    assert is_run_dir(run.path) and run.plan() == plan
    assert run.prepared() == {"prepared": "/p", "model": "/m"}
    assert (run.path / "recipe.yaml").read_text(encoding="utf-8") == "name: as written ☃\n"
    assert run.worker_argv() == [*ARGV[:-1], str(run.path)]
    assert sorted(p.name for p in run.path.iterdir()) == [
        "attempts",
        "plan.json",
        "prepared.json",
        "recipe.yaml",
        "worker.argv",
    ]
    assert (mode(run.path), mode(run.attempts)) == (0o700, 0o700)
    assert run.outcome() is None and run.metrics() == [] and run.attempt_names() == []


def test_mode_is_private_under_any_umask(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "27").mkdir(mode=0o755)  # an empty folder may be claimed
    for mask in (0o000, 0o077, 0o027):
        before = os.umask(mask)
        try:
            run = claimed(plan, tmp_path / f"{mask:o}")
        finally:
            os.umask(before)
        assert (mode(run.path), mode(run.attempts)) == (0o700, 0o700)


def test_a_groups_folder_passes_its_group_on(plan: Plan, tmp_path: Path) -> None:
    """Setgid on scratch: the run is charged to the group's quota."""
    (tmp_path / "group").mkdir()
    (tmp_path / "group").chmod(0o2775)
    run = claimed(plan, tmp_path / "group/run")
    assert mode(run.path) == 0o2700 and mode(run.attempts) == 0o2700


def test_secrets_in_the_sites_words_stay_out_of_the_plan(plan: Plan, tmp_path: Path) -> None:
    words = {"SBATCH_COMMENT": "token=abcdef123", "SBATCH_ACCOUNT": "mine"}
    site = plan.site.model_copy(update={"sbatch": words, "sbatch_extra": ("--comment=ghp_" + "a1" * 15,)})
    run = claimed(plan.model_copy(update={"site": site}), tmp_path / "r")
    kept = run.plan().site
    assert kept.sbatch == {"SBATCH_COMMENT": "token=***", "SBATCH_ACCOUNT": "mine"}
    assert kept.sbatch_extra == ("--comment=***",)


def test_the_path_is_absolute(plan: Plan) -> None:
    run = claimed(plan, Path("relative"))
    assert run.path == Path.cwd() / "relative" and run.worker_argv()[-1] == str(run.path)


def test_numbering(plan: Plan) -> None:
    stem = plan.site.runs / f"amazon-stars-{plan.digest[:8]}"
    assert next_free(plan).path == Path(f"{stem}-1") and not plan.site.runs.exists()
    assert [claimed(plan).path for _ in range(3)] == [Path(f"{stem}-{n}") for n in (1, 2, 3)]
    Path(f"{stem}-4").write_text("a file is in the way")
    Path(f"{stem}-5").mkdir()
    assert claimed(plan).path == Path(f"{stem}-6")


def test_a_claimed_directory_is_refused_and_untouched(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "it's")
    before = tree(run.path)
    with pytest.raises(ClaimedError) as caught:
        claimed(plan, run.path)
    assert caught.value.exit_code == 2 and caught.value.message == f"{run.path}: this run directory is already claimed"
    assert "afina resume '/" in caught.value.remedy and "it'\"'\"'s'" in caught.value.remedy
    with pytest.raises(ClaimedError):
        check_free(run.path)
    assert tree(run.path) == before


@pytest.mark.parametrize("kind", ["folder", "hidden", "file", "link"])
def test_what_is_not_ours_is_refused_and_untouched(plan: Plan, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "theirs"
    if kind == "file":
        path.write_text("precious")
    elif kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        (path / (".git" if kind == "hidden" else "thesis.tex")).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(EnvironmentProblem if kind == "link" else InputError) as caught:
        claimed(plan, path)
    assert not isinstance(caught.value, ClaimedError) and str(path) in caught.value.message
    assert tree(tmp_path) == before


def test_nasty_names(plan: Plan, tmp_path: Path, nasty: str) -> None:
    run = claimed(plan, tmp_path / nasty)
    assert run.worker_argv() == [*ARGV[:-1], str(tmp_path / nasty)] and run.plan() == plan
    named = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"name": nasty})})
    name = nasty.replace("\\", "_")
    assert claimed(named).path.name == f"{name}-{plan.digest[:8]}-1"


def test_a_backslash_is_no_part_of_a_folder_that_slurm_logs_into(plan: Plan) -> None:
    named = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"name": r"a\b"})})
    path = next_free(named).path
    assert path.name.startswith("a_b-") and sbatch_argv(named, path)
    with pytest.raises(InputError, match="a backslash in its name"):
        sbatch_argv(plan, path.with_name(r"c\d"))


CLAIM = """
import sys, time
from afina.run.plan import load_plan
from afina.run.new_run import claim
from afina.errors import ClaimedError, InputError
plan = load_plan(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    print("won", claim(plan, {}, ["{run}"], "", sys.argv[2] or None).path)
except ClaimedError:
    print("claimed")
"""


def race(plan: Plan, tmp_path: Path, path: str, processes: int = 4) -> list[str]:
    file = tmp_path / "plan of all.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CLAIM, str(file), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.communicate(timeout=60)[0].strip() for process in started]


def test_of_many_that_claim_one_directory_exactly_one_wins(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "above" / "the one"
    answers = race(plan, tmp_path, str(path))
    assert sorted(answers) == ["claimed"] * 3 + [f"won {path}"]
    assert RunDir(path).plan() == plan and RunDir(path).worker_argv() == [str(path)]


def test_many_at_once_get_numbers_of_their_own(plan: Plan, tmp_path: Path) -> None:
    answers = race(plan, tmp_path, "")
    assert len(set(answers)) == 4 and all(line.startswith("won ") for line in answers)
    stem = f"amazon-stars-{plan.digest[:8]}"
    assert sorted(p.name for p in plan.site.runs.iterdir()) == sorted(f"{stem}-{n}" for n in range(1, 5))


# -- no space ----------------------------------------------------------------------------------------------------------


CLAIM_FULL = """
import os, sys
from afina.errors import AfinaError
from afina.run.plan import load_plan
from afina.run.new_run import claim
plan = load_plan(sys.argv[1])
try:
    claim(plan, {}, ["{run}"] * 9000, "x" * int(sys.argv[3]), sys.argv[2])
except AfinaError as error:
    print(error)
    print(sorted(os.listdir(sys.argv[4])))
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("size", "recipe_bytes", "above"), [("4k", 100, ""), ("12k", 100, "above/"), ("4k", 100_000, "above/")]
)
def test_a_full_disk_leaves_nothing_half_made(
    plan: Plan, tmp_path: Path, size: str, recipe_bytes: int, above: str
) -> None:
    file = tmp_path / "plan of all.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    small = tmp_path / "small"
    small.mkdir()
    done = private_mounts(
        f'mount -t tmpfs -o size={size} tmpfs "$3"; exec "$1" -W error -c "$2" "$4" "$3/{above}run" {recipe_bytes} "$3"',
        sys.executable,
        CLAIM_FULL,
        small,
        file,
    )
    assert done.returncode == 3, done
    assert "No space left on device" in done.stdout and "remedy: free space or quota" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]", "left behind"


def test_a_disk_without_inodes_leaves_nothing(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan of all.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    for inodes in (3, 5):
        small = tmp_path / f"small{inodes}"
        small.mkdir()
        done = private_mounts(
            f'mount -t tmpfs -o size=1m,nr_inodes={inodes} tmpfs "$3"; exec "$1" -W error -c "$2" "$4" "$3/a/run" 9 "$3"',
            sys.executable,
            CLAIM_FULL,
            small,
            file,
        )
        assert done.returncode == 3 and done.stdout.splitlines()[-1] == "[]", (inodes, done)


def test_a_read_only_place(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan of all.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    done = private_mounts(
        'mount -t tmpfs -o ro tmpfs "$3"; exec "$1" -W error -c "$2" "$4" "$3/a/run" 9 "$3"',
        sys.executable,
        CLAIM_FULL,
        tmp_path / "working 'here'",
        file,
    )
    assert done.returncode == 3 and "Read-only file system" in done.stdout, done
