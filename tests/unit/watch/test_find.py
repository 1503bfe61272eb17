"""Runs are found below any folder, by short and by nasty names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import NASTY
from tests.unit.conftest import Ran
from tests.unit.watch.conftest import Slurm, make

from afina.errors import InputError
from afina.watch.find import find_runs, known_runs, resolve_folder, short_names


def test_runs_are_found_below_any_folder_and_by_their_short_names(slurm: Slurm, runs: Path) -> None:
    scratch = runs.parent
    for number in (10, 9, 1):
        make(runs / f"a-{number}")
    make(scratch / "sweeps/my sweep/runs/lr=1e-5")
    (scratch / "sweeps/my sweep/sweep.json").write_text("{}")
    make(runs / "a-1/checkpoints/not a run of its own")
    (runs / ".staging").mkdir()
    everything = [*(runs / f"a-{n}" for n in (1, 9, 10)), scratch / "sweeps/my sweep/runs/lr=1e-5"]
    assert known_runs() == everything
    assert find_runs([runs, runs / "a-9"]) == everything[:3]
    names = short_names(everything)
    assert names == ["a-1", "a-9", "a-10", "my sweep/lr=1e-5"]
    assert [find_runs([name]) for name in names] == [[run] for run in everything]
    assert find_runs(["my sweep"]) == everything[3:]
    with pytest.raises(InputError, match="a-11: no such folder") as caught:
        find_runs(["a-11"])
    assert "did you mean `a-1" in caught.value.remedy
    with pytest.raises(InputError, match="there is none below it"):
        find_runs([scratch / "sweeps/my sweep/runs/lr=1e-5/attempts"])


def test_the_beginning_of_a_name_is_enough_where_it_is_of_one(slurm: Slurm, runs: Path) -> None:
    sweep = runs.parent / "sweeps/lr-5f5f5f5f"
    for folder in (runs / "yelp-1a2b3c4d-1", runs / "yelp-1a9f0000-10", sweep / "runs/lr=1e-5,seed=1"):
        make(folder)
    (runs / ".yelp-1a2-staging").mkdir()
    assert resolve_folder("yelp-1a2") == runs / "yelp-1a2b3c4d-1"
    assert resolve_folder("lr-") == sweep and resolve_folder("lr-5f5f5f5f/lr=1") == sweep / "runs/lr=1e-5,seed=1"
    with pytest.raises(InputError, match="yelp: several names begin so: yelp-1a2b3c4d-1, yelp-1a9f0000-10"):
        resolve_folder("yelp")
    with pytest.raises(InputError, match="yelp-1a9f0000-1: no such folder"):  # never run 10
        resolve_folder("yelp-1a9f0000-1")


def test_what_cannot_be_looked_into_hides_nothing_else(slurm: Slurm, runs: Path) -> None:
    """Another user's runs are closed (0700); a link may lead in a circle."""
    make(runs / "mine")
    (runs / "a circle").symlink_to(runs / "a circle")
    (runs / "nowhere").symlink_to(runs / "gone")
    make(runs / "theirs/run")
    (runs / "theirs").chmod(0)
    open_to_us = os.access(runs / "theirs", os.R_OK)  # as everything is to root
    assert known_runs() == [runs / "mine", *([runs / "theirs/run"] if open_to_us else [])]
    (runs / "theirs").chmod(0o700)


def test_nasty_names(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    for name in NASTY:
        make(runs / name)
    done = command("list", "--json")
    assert done.returncode == 0, done.stderr
    assert {Path(r["run"]).name for r in json.loads(done.stdout)} == set(NASTY)
    shown = command("status").stdout.splitlines()
    assert len(shown) == len(NASTY) + 2, "a name with a line break is one line"
    assert not (runs.parent / "pwned").exists()


@pytest.mark.parametrize("verb", ["status", "logs", "cancel"])
def test_a_deleted_run_is_told_by_its_job_its_name_and_its_path(
    slurm: Slurm, runs: Path, command: Callable[..., Ran], verb: str
) -> None:
    make(runs / "kept", job="6")
    gone, elsewhere = runs / "it's gone-1", runs.parent / "else where"
    make(elsewhere)
    queued = [f"7|{gone}/finetune.sbatch {gone}", f"8|{elsewhere}/submitit/.submission_file_1.sh", "9|/bin/theirs x"]
    slurm.answer("squeue", *queued)
    for word in ("7", gone.name, gone):
        done = command(verb, word)
        said = (
            f"error: {word}: {gone} was deleted, and job 7 of it is still in the queue\n  remedy: scancel 7; then start"
        )
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(said), done.stderr
    assert resolve_folder("8") == elsewhere and resolve_folder("6") == runs / "kept"
    for number in ("9", "11_2"):
        done = command(verb, number)
        assert f"no run below {runs.parent} has had this job: it has not begun, its run directory was" in done.stderr
        assert f"sacct -j {number}" in done.stderr and done.returncode == 2
