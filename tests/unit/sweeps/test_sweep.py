"""Sweeps on the host: what is claimed and submitted, and what the same command does again. Sweeps that train: test_local.py."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import program
from tests.unit.conftest import Ran, tree
from tests.unit.sweeps.conftest import GRID, SEARCH, array_of, ask, end, queue

from afina.errors import ClaimedError, DataError, InputError, SlurmError, WaitTimeout
from afina.recipe.parse import parse_recipe
from afina.run import new_run
from afina.run.commands import sweep_argv
from afina.sweeps.draft import SweepRequest, draft_sweep, dry_run
from afina.sweeps.grid import parse_grid
from afina.sweeps.sweep import Sweep

# -- the first time ----------------------------------------------------------------------------------------------------


def test_a_sweep_is_claimed_and_submitted_as_one_array(
    sweep: Callable[..., Sweep], submitted: Callable[[], list[list[str]]], prepared: list[Any], scratch: Path
) -> None:
    made = sweep(GRID, seeds=2, max_parallel=3, time_min=7)
    assert made.path.parent == scratch / "sweeps" and made.path.name.startswith("amazon-stars-")
    assert made.submitted == ("100",) and len(prepared) == 1
    record = made.record
    assert [cell.name for cell in record.cells] == [
        f"learning_rate={r},seed={s}" for r in ("5e-3", "1e-3") for s in (1, 2)
    ]
    (words,) = submitted()
    plan = made.runs[0].dir.plan()
    assert words == sweep_argv(plan, made.path, [0, 1, 2, 3], at_once=3)[1:]
    assert (
        array_of(words) == "0-3%3"
        and "--time=7" in words
        and words[-2:] == [str(made.path / "finetune.sbatch"), str(made.path)]
    )
    assert f"--output={str(made.path).replace('%', '%%')}/logs/%A_%a.out" in words and (made.path / "logs").is_dir()
    # What the batch script reads is the cells, in order.
    names = [os.fsdecode(name) for name in (made.path / "cells").read_bytes().split(b"\0")[:-1]]
    assert names == [run.path.name for run in made.runs]
    for number, (run, cell) in enumerate(zip(made.runs, record.cells, strict=True)):
        plan = run.dir.plan()
        assert plan.digest == cell.digest and plan.recipe.resources.time == 7
        assert (plan.recipe.train.learning_rate, plan.recipe.train.seed) == (
            float(cell.overrides[0].split("=")[1]),
            cell.seed,
        )
        assert run.job_id == f"100_{number}" and (run.path / "job.sh").is_file()
    assert len({run.dir.plan().digest for run in made.runs}) == 4


def test_every_run_can_be_made_again_from_its_record(
    sweep: Callable[..., Sweep], recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of a cell, and of a trial, gives its recipe back, with what the whole sweep was given."""
    common = ["train.arguments.weight_decay=0.2"]
    made = sweep(
        "train.learning_rate=5e-3,1e-3", "data.files.all=reviews.csv,./reviews.csv", overrides=common, time_min=7
    )
    found = sweep(search=SEARCH[:1], trials=1, overrides=common, time_min=7, directory="s")
    runs = [*(run.dir for run in made.runs), ask(found, 0)]
    for run in runs:
        record = json.loads((run.path / "record.json").read_text())
        recipe = parse_recipe((run.path / "recipe.yaml").read_text(), record["recipe"]["overrides"])
        assert recipe == run.plan().recipe and recipe.train.arguments["weight_decay"] == 0.2
        assert record["plan"] == run.plan().digest
    assert len({json.loads((run.path / "record.json").read_text())["plan"] for run in runs}) == len(runs)


def test_a_grid_over_what_is_prepared_prepares_each_once(sweep: Callable[..., Sweep], prepared: list[Any]) -> None:
    made = sweep("tokens.max_length=32,64", "train.epochs=1,2", seeds=3)
    assert [plan.recipe.tokens.max_length for plan in prepared] == [32, 64]
    for run in made.runs:
        length = run.dir.plan().recipe.tokens.max_length
        assert run.dir.prepared()["prepared"] == f"/prepared/{length}"


def test_a_dry_run_shows_the_command_and_changes_nothing(
    sweep: Callable[..., Sweep], recipe_file: Callable[..., Path], submitted: Callable[[], list[list[str]]], scratch: Path, tmp_path: Path
) -> None:  # fmt: skip
    recipe_file()
    before = tree(tmp_path)
    shown = dry_run(draft_sweep(recipe_file(), SweepRequest(grid=parse_grid([GRID]), seeds=2, max_parallel=3)))
    assert tree(tmp_path) == before
    made = sweep(GRID, seeds=2, max_parallel=3)
    assert shown["sweep"] == str(made.path) and [command[1:] for command in shown["commands"]] == submitted()
    assert [cell["cell"] for cell in shown["cells"]] == [cell.name for cell in made.record.cells]


def test_bad_data_leaves_nothing(
    sweep: Callable[..., Sweep],
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    submitted: Callable[[], list[list[str]]],
) -> None:
    def refuse(plan: Any) -> dict[str, Any]:
        if plan.recipe.tokens.max_length == 64:
            raise DataError("row 3 has no label", "label it")
        return {}

    monkeypatch.setattr(new_run, "prepare", refuse)
    before = tree(scratch)
    with pytest.raises(DataError, match="cell max_length=64: row 3 has no label"):
        sweep("tokens.max_length=32,64")
    assert tree(scratch) == before and submitted() == []


def test_a_refused_submission_leaves_nothing(sweep: Callable[..., Sweep], scratch: Path, bin: Path) -> None:
    program(bin, "sbatch", "echo 'sbatch: error: invalid partition specified: gqu' >&2; exit 1\n")
    before = tree(scratch)
    with pytest.raises(SlurmError, match="invalid partition"):
        sweep(GRID, seeds=2)
    assert tree(scratch) == before


def test_what_was_cut_short_is_gone_on_with(
    sweep: Callable[..., Sweep], submitted: Callable[[], list[list[str]]]
) -> None:
    """Killed before `sweep.json` was written, and in the middle of claiming a run."""
    made = sweep(GRID, seeds=2)
    (made.path / "sweep.json").unlink()
    (made.path / "submissions.jsonl").unlink()
    half = made.path / "runs/learning_rate=1e-3,seed=1"
    for name in ("plan.json", "submissions.jsonl"):
        (half / name).unlink()
    again = sweep(GRID, seeds=2)
    assert again.path == made.path and len(again.runs) == 4
    assert array_of(submitted()[-1]) == "0-3", "what was submitted is lost from the queue"


# -- again -------------------------------------------------------------------------------------------------------------


def test_the_same_command_submits_what_is_missing_and_no_more(
    sweep: Callable[..., Sweep], submitted: Callable[[], list[list[str]]], bin: Path, prepared: list[Any]
) -> None:
    first = sweep("train.learning_rate=1e-2,5e-3,1e-3,5e-4", seeds=2, max_parallel=4)
    runs = [run.dir for run in first.runs]
    end(runs[0], "finished")
    end(runs[1], "stopped", code=75, cause="signal")
    end(runs[2], "failed", code=4, cause="loss")
    # 3 left the queue without a word; 4 runs, 5 waits; 6 was put back after a failure, 7 goes on as another job.
    end(runs[6], "failed", code=4, cause="killed")
    end(runs[7], "failed", code=4, cause="node")
    runs[7].append("submissions.jsonl", {"job_id": "77", "via": "resubmit"})
    others = ("100_4 RUNNING", "100_5 PENDING", "100_6 PENDING", "77 PENDING", "55_1 RUNNING", "1 RUNNING")
    queue(bin, *others, "100_0 COMPLETED", "100_3 NODE_FAIL")
    expected = ["FINISHED", "STOPPED", "FAILED", "FAILED", "RUNNING", "PENDING", "PENDING", "PENDING"]
    assert list(first.states().values()) == expected
    again = sweep("train.learning_rate=1e-2,5e-3,1e-3,5e-4", seeds=2, max_parallel=6)
    # Two of the six places are left.
    assert [array_of(words) for words in submitted()] == ["0-7%4", "1-3%2"] and again.submitted == ("101",)
    assert len(prepared) == 1, "nothing was claimed, nothing is prepared"
    assert [run.job_id for run in again.runs] == ["100_0", "101_1", "101_2", "101_3", "100_4", "100_5", "100_6", "77"]
    queue(bin, "101_1 PENDING", "101_2 PENDING", "101_3 CONFIGURING", *others)
    assert sweep("train.learning_rate=1e-2,5e-3,1e-3,5e-4", seeds=2).submitted == ()
    assert len(submitted()) == 2


def test_a_run_that_was_claimed_in_a_task_of_an_array_is_found_by_it(sweep: Callable[..., Sweep], bin: Path) -> None:
    """`sbatch --array=… finetune.sbatch RECIPE`: only the names of its attempts tell the job."""
    run = sweep(GRID).runs[0]
    (run.path / "submissions.jsonl").unlink()
    run.dir.begin_attempt("12_3.0")
    run.dir.begin_attempt("12_10.0")
    for task, state in ((3, "FAILED"), (10, "PENDING")):
        queue(bin, f"12_{task} PENDING")
        assert (run.state == "PENDING") is (state == "PENDING"), task


def test_squeue_without_an_answer_submits_nothing_twice(
    sweep: Callable[..., Sweep], submitted: Callable[[], list[list[str]]], bin: Path
) -> None:
    made = sweep(GRID)
    end(made.runs[0].dir, "finished")
    program(bin, "squeue", "exit 1\n")
    assert list(made.states().values()) == ["FINISHED", "UNKNOWN"]
    with pytest.raises(SlurmError, match="none is submitted twice"):
        sweep(GRID)
    assert len(submitted()) == 1


def test_waiting_for_a_sweep_ends(sweep: Callable[..., Sweep], bin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its limit, and at once where there is no squeue: nobody here would ever know."""
    made = sweep(GRID)
    with pytest.raises(InputError, match=r"^timeout_s: must be a number of seconds"):
        made.wait("1")  # type: ignore[arg-type]
    program(bin, "squeue", "exit 1\n")
    with pytest.raises(WaitTimeout, match="still running"):
        made.wait(0)
    (bin / "squeue").unlink()
    monkeypatch.setenv("PATH", str(bin))
    with pytest.raises(SlurmError, match="squeue is not on PATH"):
        made.wait()


def test_a_changed_grid_adds_cells_and_keeps_the_old(
    sweep: Callable[..., Sweep], submitted: Callable[[], list[list[str]]], prepared: list[Any]
) -> None:
    first = sweep(GRID, seeds=1)
    end(first.runs[0].dir, "finished")
    before = tree(first.runs[0].path)
    # The same values in other spellings are the same cells; 1e-3 is not asked for any more and is left alone.
    grown = sweep("train.learning_rate=0.005,2e-3", seeds=2)
    assert grown.path == first.path and tree(first.runs[0].path) == before
    assert [cell.name for cell in grown.record.cells] == [
        "learning_rate=5e-3,seed=1",
        "learning_rate=1e-3,seed=1",
        "learning_rate=0.005,seed=2",
        "learning_rate=2e-3,seed=1",
        "learning_rate=2e-3,seed=2",
    ]
    assert [array_of(words) for words in submitted()] == ["0-1", "2-4"]


def test_a_sweep_of_another_recipe_is_refused_with_the_difference(
    sweep: Callable[..., Sweep], tmp_path: Path, recipe_file: Callable[..., Path]
) -> None:
    home = tmp_path / "my sweep"
    made = sweep(GRID, directory=home)
    before = tree(home)
    with pytest.raises(InputError) as caught:
        sweep(GRID, directory=home, overrides=["train.epochs=2", "tokens.max_length=64"])
    assert "tokens.max_length: 256 there, 64 now; train.epochs: 1.0 there, 2.0 now" in caught.value.message
    with pytest.raises(InputError, match="was made with --grid"):
        sweep(search=["train.epochs=1..2"], directory=home)
    assert tree(home) == before
    # More time and another name are no other recipe.
    assert sweep(GRID, directory=home, overrides=["name=other"], time_min=99).path == made.path


@pytest.mark.parametrize("what", ["a file", "a run", "something else"])
def test_a_folder_that_is_no_sweep_is_left_alone(sweep: Callable[..., Sweep], tmp_path: Path, what: str) -> None:
    home = tmp_path / "there"
    if what == "a file":
        home.write_text("")
    elif what == "a run":
        home = sweep(GRID).runs[0].path
    else:
        home.mkdir()
        (home / "thesis.tex").write_text("")
    before = tree(home)
    with pytest.raises(InputError, match=r"is a run directory|is a file|holds thesis\.tex"):
        sweep(GRID, directory=home)
    assert tree(home) == before


def test_two_at_once(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID)
    with made.dir.lock(), pytest.raises(ClaimedError, match="is working here"):
        sweep(GRID)


def test_a_large_sweep_is_several_arrays(
    sweep: Callable[..., Sweep], submitted: Callable[[], list[list[str]]], bin: Path
) -> None:
    """Numbers below MaxArraySize only; an array that Slurm refuses is submitted by the next call."""
    program(bin, "scontrol", "echo 'MaxArraySize            = 3'\n")
    real = (bin / "sbatch").read_text()
    program(bin, "sbatch", f'case "$*" in *" 6") exit 1 ;; esac\n{real}')
    with pytest.raises(SlurmError):
        sweep("train.learning_rate=1e-2,5e-3,1e-3,5e-4", seeds=2, max_parallel=6)
    home = submitted()[0][-1]
    assert [(array_of(words), words[-1]) for words in submitted()] == [("0-2%2", home), ("0-2%2", "3")]
    made = Sweep(home)
    assert [run.job_id for run in made.runs] == [*(f"{a}_{t}" for a in (100, 101) for t in range(3)), None, None]
    program(bin, "sbatch", real.removeprefix("#!/bin/bash\n"))
    queue(bin, *(f"{run.job_id} RUNNING" for run in made.runs[:6]))
    again = sweep("train.learning_rate=1e-2,5e-3,1e-3,5e-4", seeds=2, max_parallel=6)
    assert (array_of(submitted()[-1]), submitted()[-1][-1], again.runs[7].job_id) == ("0-1%1", "6", "102_1")


def test_a_limit_of_submitted_jobs_takes_a_sweep_in_portions(
    sweep: Callable[..., Sweep], submitted: Callable[[], list[list[str]]], bin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm lets three more jobs in."""
    real = (bin / "sbatch").read_text().removeprefix("#!/bin/bash\n")
    limit = 'case "$*" in *--array=0-2\\ * | *--array=[0-2]\\ *| *--array=0-1\\ * | *--version*) ;; *) echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1 ;; esac\n'
    program(bin, "sbatch", limit + real)
    made = sweep("train.learning_rate=1e-2,5e-3,1e-3,5e-4", seeds=2)
    assert sum(run.job_id is not None for run in made.runs) == 3 and not (made.path / "intent.json").exists()
    assert "5 runs are left; repeat the command" in capsys.readouterr().out
    program(bin, "sbatch", real)
    queue(bin, *(f"{run.job_id} RUNNING" for run in made.runs if run.job_id))
    again = sweep("train.learning_rate=1e-2,5e-3,1e-3,5e-4", seeds=2)
    assert array_of(submitted()[-1]) == "3-7" and all(run.job_id for run in again.runs)


def test_what_was_purged_is_claimed_again(sweep: Callable[..., Sweep], prepared: list[Any]) -> None:
    import shutil

    made = sweep(GRID)
    shutil.rmtree(made.runs[1].path)
    assert len(made.runs) == 1 and len(sweep(GRID).runs) == 2 and len(prepared) == 2


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing to sweep over"),
        (["--seeds", "0"], "at least one seed is needed"),
        (["--seeds", "2", "--grid", "train.seed=1,2"], "--grid train.seed: is also given by --seeds"),
        (["--grid", "train.learning_rat=1,2"], "did you mean `learning_rate`?"),
        (["--grid", "train.learning_rate=1,x"], "cell learning_rate=x,seed=1"),
        (["--grid", "data.files=absent.csv,other.csv"], "absent.csv: no such file"),
        (["--search", "train.epochs=1..2", "--seeds", "2"], "--search: cannot be combined with --grid or --seeds"),
        (["--search", "train.epoch=1..2"], "--search train.epoch: unknown key `train.epoch`"),
        (["--search", "train.learning_rate=-1..2"], "--search train.learning_rate: must be more than 0"),
        (["--seeds", "2", "--trials", "3"], "--trials: has no effect without --search"),
        (["--seeds", "2", "--num-processes", "1"], "--num-processes: has no effect without --local"),
        (["--seeds", "2", "--local", "--max-parallel", "2"], "--max-parallel: is for Slurm"),
        (["--seeds", "2", "--metric", "f1"], "--metric: is for the table"),
    ],
)
def test_a_wrong_command_is_refused_and_leaves_nothing(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], scratch: Path, words: list[str], says: str
) -> None:
    recipe = recipe_file()
    before = tree(scratch, recipe.parent)
    done = command("sweep", recipe, *words)
    assert done.returncode == 2 and done.stdout == "" and says in done.stderr, done
    assert done.stderr.startswith("error: ") and "\n  remedy: " in done.stderr and "Traceback" not in done.stderr
    assert tree(scratch, recipe.parent) == before


def test_the_command_submits_and_shows(
    command: Callable[..., Ran], sweep: Callable[..., Sweep], recipe_file: Callable[..., Path]
) -> None:
    made = sweep(GRID, seeds=2)
    for run in made.runs:
        end(run.dir, "finished")
    words = ("sweep", recipe_file(), "--grid", GRID, "--seeds", "2")
    done = command(*words)
    assert done.returncode == 0 and done.stderr == "", done
    assert "4 runs: 4 finished, 0 queued or running, 0 submitted\n" in done.stdout
    assert f"its table: afina sweep {shlex.quote(str(made.path))}" in done.stdout
    done = command(*words, "--json")
    assert json.loads(done.stdout)["jobs"] == [] and set(json.loads(done.stdout)["states"].values()) == {"FINISHED"}
    assert str(made.table()) in command("sweep", made.path).stdout
    assert str(made.table()) in command("sweep", made.path.name[:-2]).stdout
    assert json.loads(command("sweep", made.path, "--json", "--wait").stdout)["best"] == "learning_rate=5e-3"
    done = command("sweep", made.path, "--grid", GRID)
    assert done.returncode == 2 and "is a sweep directory" in done.stderr
    shown = json.loads(command(*words, "--dry-run", "--json").stdout)
    assert shown["commands"] == [] and [cell["submit"] for cell in shown["cells"]] == [False] * 4
