"""Sweeps on the host: what is claimed and submitted, what the same command does again, and what the table says.

sbatch and squeue are small programs on PATH; what `prepare` says is given. Sweeps that train: test_local.py.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.common import program
from tests.unit.conftest import Ran, tree
from tests.unit.statistics.test_scores import write

from afina.errors import ClaimedError, DataError, InputError, SlurmError, WaitTimeout
from afina.files import read_json
from afina.recipe.parse import parse_recipe
from afina.reports import compare as compare_page
from afina.reports.collection import collection_page
from afina.reports.compare import compare
from afina.run import new_run
from afina.run.commands import sweep_argv
from afina.run.directory import RunDir
from afina.run.job_request import JobRequest
from afina.run.outcome import Outcome
from afina.statistics.intervals import paired_t_test
from afina.sweeps.draft import SweepRequest, draft_sweep, dry_run
from afina.sweeps.grid import parse_grid
from afina.sweeps.space import parse_search
from afina.sweeps.sweep import Sweep, carry_out

GRID = "train.learning_rate=5e-3,1e-3"


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm: sbatch records its words, and answers 100, 101, …; nothing is ever in the queue."""
    folder = tmp_path / "fake bin"
    calls = shlex.quote(str(tmp_path / "sbatch"))
    program(
        folder,
        "sbatch",
        f'[ "$1" != --version ] || exec echo slurm 22.05.8; printf "%s\\0" "$@" >>{calls}; printf "\\n\\0" >>{calls}; echo $((99 + $(tr -cd "\\n" <{calls} | wc -c)))\n',
    )
    program(folder, "squeue", "exit 0\n")
    program(folder, "scontrol", "exit 1\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def submitted(tmp_path: Path) -> Callable[[], list[list[str]]]:
    """The words of every call of sbatch, without the token of the submission."""

    def read() -> list[list[str]]:
        file = tmp_path / "sbatch"
        calls: list[list[str]] = [[]]
        for word in file.read_bytes().split(b"\0")[:-1] if file.exists() else ():
            if word == b"\n":
                calls.append([])
            elif not word.startswith(b"--comment=afina:"):
                calls[-1].append(os.fsdecode(word))
        return calls[:-1]

    return read


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans that were prepared; what they become is made up."""
    plans: list[Any] = []

    def prepare(plan: Any) -> dict[str, Any]:
        plans.append(plan)
        rows = {"train": 64, "eval": 20}
        answer = {"prepared": f"/prepared/{plan.recipe.tokens.max_length}", "task": "single-label", "rows": rows}
        if plan.recipe.data.fold is None:
            return answer
        sizes = [[(4, 6), (5, 5)], [(3, 3, 4)]][plan.recipe.data.fold.of - 2]
        folds = [[{"rows": n, "tokens": 10 * n} for n in repeat] for repeat in (*sizes, *sizes[-1:])]
        return {
            **answer,
            "folds": folds,
            "rows": {"train": 6, "eval": 4, "test": 3},
            "tokens": {"train": 60, "eval": 40},
        }

    monkeypatch.setattr(new_run, "prepare", prepare)
    return plans


@pytest.fixture
def sweep(
    bin: Path, prepared: list[Any], recipe_file: Callable[..., Path], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Sweep]:
    """`afina.sweep` of the recipe of these tests, with the grid as the command line has it."""
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))

    def run(*grid: str, max_parallel: int | None = None, **options: Any) -> Sweep:
        changes = options.pop("changes", {})
        if "search" in options:
            options["search"] = parse_search(options["search"])
        job = JobRequest(**{f.name: options.pop(f.name) for f in fields(JobRequest) if f.name in options})
        request = SweepRequest(grid=parse_grid(grid), max_parallel=max_parallel, job=job, **options)
        return carry_out(draft_sweep(recipe_file(**changes), request))

    return run


def end(
    run: RunDir,
    kind: str,
    accuracy: float | None = 0.5,
    *,
    cause: str = "",
    code: int = 0,
    pruned: bool = False,
    **events: Any,
) -> None:
    """Let a run have ended."""
    run.begin_attempt("9.0")
    if events:
        run.event("attempt_ended", attempt="9.0", **events)
    outcome: Any = kind
    run.record(
        Outcome(outcome=outcome, exit_code=code, attempt="9.0", task="single-label", metrics={"eval_accuracy": accuracy}, cause=cause, pruned=pruned)
    )  # fmt: skip


def queue(bin: Path, *jobs: str) -> None:
    """Let squeue say `<array>_<task> STATE` of these."""
    words = [f"{job}|4242|{state}|10:00|N/A|n1|None" for job, _, state in (job.partition(" ") for job in jobs)]
    program(bin, "squeue", f"printf '%s\\n' {' '.join(map(shlex.quote, words))}\n")


def array_of(words: list[str]) -> str:
    return next(word for word in words if word.startswith("--array=")).removeprefix("--array=")


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


# -- the table ---------------------------------------------------------------------------------------------------------

ACCURACIES = {
    "5e-3": [0.61, 0.63, 0.62, 0.66, 0.58],
    "1e-3": [0.60, 0.61, 0.61, 0.63, 0.57],
    "1e-4": [0.2, 0.25, 0.3, 0.2, 0.21],
}


def test_the_table(sweep: Callable[..., Sweep], bin: Path) -> None:
    """Means, intervals and Holm's p against scipy; a point in the queue is shown and does not win."""
    from scipy import stats

    made = sweep(f"train.learning_rate={','.join(ACCURACIES)},9e-9", seeds=5)
    for number, run in enumerate(made.runs[:15]):
        end(run.dir, "finished", [v for values in ACCURACIES.values() for v in values][number])
    end(made.runs[15].dir, "finished", 0.99)  # one lucky seed of five
    queue(bin, "100_16 RUNNING", "100_17 PENDING")
    table = made.table()
    assert (table.metric, table.direction) == ("eval_accuracy", "maximize")
    assert [row.point for row in table.rows] == [f"learning_rate={v}" for v in ("5e-3", "9e-9", "1e-3", "1e-4")]
    assert table.best is not None and table.best.point == "learning_rate=5e-3" == made.best().point
    raw = [stats.ttest_rel(ACCURACIES[v], ACCURACIES["5e-3"]) for v in ("1e-3", "1e-4")]
    rows = {row.point.removeprefix("learning_rate="): row for row in table.rows}
    for value, test in zip(("1e-3", "1e-4"), raw, strict=True):
        values, row = ACCURACIES[value], rows[value]
        assert row.interval is not None and row.against_best is not None
        low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
        assert (row.interval.low, row.interval.high) == (pytest.approx(low), pytest.approx(high))
        assert row.against_best.p == pytest.approx(test.pvalue)
    small, large = sorted(test.pvalue for test in raw)
    assert sorted(row.p for row in table.rows if row.p is not None) == [
        pytest.approx(2 * small),
        pytest.approx(max(2 * small, large)),
    ]
    assert rows["9e-9"].states == {"FAILED": 2, "FINISHED": 1, "PENDING": 1, "RUNNING": 1} and rows["9e-9"].p is None
    text = str(table)
    assert "learning_rate=5e-3  0.6200  [0.5838, 0.6562]  5/5    best" in text
    assert "2 failed, 1 pending, 1 running" in text
    # The next is the next that can be tested; nothing is claimed about the lucky seed.
    assert (
        "Best: learning_rate=5e-3. It is distinguishable from the next (learning_rate=1e-3): paired over 5 seeds"
        in text
    )
    assert "after correction for 2 comparisons" in text
    assert "Not tested, too few finished runs: learning_rate=9e-9 (1 of 5)." in text
    assert "Holm-corrected" in text and "selected by the same numbers" in text
    as_json = json.loads(json.dumps(table.to_dict()))
    assert as_json["best"] == "learning_rate=5e-3" and as_json["rows"][0]["values"]["3"] == 0.62
    with pytest.raises(InputError, match="did you mean `accuracy`"):
        made.table("acuracy")


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ([0.60, 0.61, 0.61, 0.63, 0.57], "It is distinguishable from the next (learning_rate=1e-3): paired over 5 seeds, p = 0.0"),
        ([0.64, 0.60, 0.63, 0.62, 0.59], "It is NOT distinguishable from the next (learning_rate=1e-3): paired over 5 seeds, p = 0."),
    ],
)  # fmt: skip
def test_the_table_says_whether_the_best_is_better(sweep: Callable[..., Sweep], second: list[float], says: str) -> None:
    made = sweep(GRID, seeds=5)
    for run, value in zip(made.runs, [*ACCURACIES["5e-3"], *second], strict=True):
        end(run.dir, "finished", value)
    assert says in str(made.table())


def test_equals_of_the_best_are_called_so(sweep: Callable[..., Sweep]) -> None:
    made = sweep("train.learning_rate=5e-3,2e-3,1e-3", seeds=5)
    for run, value in zip(made.runs, [*[1.0] * 10, *ACCURACIES["1e-3"]], strict=True):
        end(run.dir, "finished", value)
    text = str(made.table())
    assert "Best: learning_rate=5e-3. It is distinguishable from learning_rate=1e-3: paired over 5 seeds" in text
    assert (
        "Same difference to the best in every seed, so that no test applies: learning_rate=2e-3." in text
        and "too few" not in text
    )


def test_one_seed_tells_nothing(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID)
    for run, value in zip(made.runs, (0.9, 0.1), strict=True):
        end(run.dir, "finished", value)
    text = str(made.table())
    assert "It cannot be compared with the next (learning_rate=1e-3): they share 1 finished seed." in text
    assert "p =" not in text and "distinguishable" not in text and "--seeds 5 adds four to each" in text
    assert all(line.split()[-1] != "finished" for line in text.splitlines()[4:6])


def test_the_table_before_the_end(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID, seeds=2)
    assert "No run has finished yet." in str(made.table()) and made.table().best is None
    with pytest.raises(InputError, match="no run has finished yet"):
        made.best()
    end(made.runs[2].dir, "finished", 0.4)
    text = str(made.table())
    assert (
        "Provisional: no point has a value of each of its runs." in text
        and "learning_rate=1e-3" in text.splitlines()[4]
    )


def test_finished_runs_whose_metric_is_undefined_are_said(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID, seeds=2)
    end(made.runs[2].dir, "finished", None)
    text = str(made.table())
    assert "eval_accuracy is not defined in 1 finished run, which no mean" in text and "has finished yet" not in text
    with pytest.raises(InputError, match="eval_accuracy is not defined in 1 finished run"):
        made.best()
    end(made.runs[3].dir, "finished", 0.4)
    text = str(made.table())
    assert "is not defined in 1 finished run" in text and "no point has a value of each of its runs" in text
    assert made.best().values == {2: 0.4} and "1/2" in text
    searched = sweep(search=["train.learning_rate=1e-5..1e-1:log"], trials=4, directory="search")
    end(ask(searched, 0), "finished", None)
    assert "eval_accuracy is not defined in 1 finished run" in str(searched.table())


def test_a_metric_of_which_the_least_is_best(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID, overrides=["task=regression", "metrics=[mse, mae]"])
    for run, value in zip(made.runs, (0.3, 0.2), strict=True):
        run.dir.begin_attempt("9.0")
        run.dir.record(
            Outcome(
                outcome="finished",
                exit_code=0,
                attempt="9.0",
                task="regression",
                metrics={"eval_mse": value, "eval_pearson": value},
            )
        )
    table = made.table()
    assert (table.metric, table.direction, made.best().point) == ("eval_mse", "minimize", "learning_rate=1e-3")
    assert made.best("pearson").point == "learning_rate=5e-3"


def test_the_test_split_is_shown_and_chooses_nothing(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID, seeds=2)
    for run, value in zip(made.runs, (0.8, 0.82, 0.6, 0.62), strict=True):
        run.dir.begin_attempt("9.0")
        metrics = {"eval_accuracy": value, "test_accuracy": 1 - value}
        run.dir.record(Outcome(outcome="finished", exit_code=0, attempt="9.0", task="single-label", metrics=metrics))
    table = made.table("test_accuracy")
    assert (table.metric, table.shown) == ("eval_accuracy", "test_accuracy")
    assert table.best is not None and table.best.point == "learning_rate=5e-3", "the best by eval, the worst by test"
    assert table.best.shown is not None and table.best.shown.mean == pytest.approx(0.19)
    text = str(table)
    assert "test_accuracy is only shown" in text and "looked at for the first time" in text
    assert (
        "looked at 1 time before" in str(made.table("test_f1")) and made.best("test_accuracy").point == table.best.point
    )
    assert table.to_dict()["rows"][0]["shown"]["mean"] == pytest.approx(0.19)


def test_warnings_about_the_data_stand_below_the_table_once(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID, seeds=2)
    shared, repeated = "3 of 9 rows of test are in train too", "4 of 9 rows of eval repeat an earlier one"
    for run in made.runs:
        end(run.dir, "finished")
        about = {"spoiled": {"eval": [repeated], "test": [shared]}}
        (run.path / "prepared.json").write_text(json.dumps({**run.dir.prepared(), **about}))
    text = str(made.table())
    assert text.count(f"Warning: {repeated}") == 1 and shared not in text


def test_models_of_no_use_are_called_so_and_none_is_best(sweep: Callable[..., Sweep]) -> None:
    """One label for all rows, and fewer right than the majority class."""
    made = sweep("train.learning_rate=1,5e-3,1e-3", seeds=2)
    truth = np.array([0] * 30 + [1] * 20 + [2] * 10)
    constant, worse, good = np.zeros(60, int), np.roll(truth, 20), truth.copy()
    good[:20] = 1
    assert (worse == truth).mean() < 0.5 < (good == truth).mean()

    def ended(number: int, predicted: Any) -> None:
        run = made.dir.run(made.record.cells[number].name)
        write(run.predictions, "single-label", truth, 4 * np.eye(3)[predicted])
        end(run, "finished", float((truth == predicted).mean()))

    for number in range(4):
        ended(number, constant if number < 2 else worse)
    table = made.table()
    text = str(table)
    assert table.best is None and table.to_dict()["best"] is None and "Best" not in text
    assert "No best: every finished point predicts one and the same for all rows" in text
    assert "learning_rate=1: predicts 'one star' for every row of eval." in text
    with pytest.raises(InputError, match="No best"):
        made.best()
    ended(4, good)
    ended(5, good)
    assert made.best().point == "learning_rate=1e-3" and "remark" in str(made.table())
    assert "is not better than always predicting the majority class 'one star'" in made.table().rows[-1].weak


# -- a search ----------------------------------------------------------------------------------------------------------

SEARCH = ["train.learning_rate=1e-5..1e-1:log", "train.arguments.weight_decay=0.0,0.1", "train.epochs=1..9"]


def ask(made: Sweep, number: int) -> RunDir:
    """What an array task does when it starts."""
    from afina.worker.node import trial

    run = made.dir.run(made.record.cells[number].name)
    assert trial.answer([str(run.path)]) == {"run": str(run.path)}
    return run


def study(made: Sweep) -> list[Any]:
    from afina.worker.node import trial

    search = made.record.search
    assert search is not None
    found: list[Any] = trial.open_study(made.dir, search).get_trials(deepcopy=False)
    return found


def test_a_search_asks_tells_and_replaces(
    sweep: Callable[..., Sweep], submitted: Callable[[], list[list[str]]], prepared: list[Any], bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    made = sweep(search=SEARCH, trials=4, max_parallel=2, directory="search it's")
    # Both ends of the searched arguments were checked, and no run is claimed before its task starts.
    assert [plan.recipe.train.arguments["weight_decay"] for plan in prepared] == [0.0, 0.1]
    assert made.runs == [] and array_of(submitted()[0]) == "0-3%2"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    first = ask(made, 0)
    plan = first.plan()
    assert 1e-5 <= plan.recipe.train.learning_rate <= 1e-1 and plan.recipe.train.epochs in range(1, 10)
    assert plan.recipe.train.arguments["weight_decay"] in (0.0, 0.1)
    assert first.prepared()["prepared"] == "/prepared/256" and (first.path / "job.sh").is_file()
    assert first.worker_argv()[-1] == str(first.path)
    assert [line["job_id"] for line in first.lines("submissions.jsonl")] == ["100_0"]
    # Put back into the queue: the same trial.
    before = tree(first.path)
    assert ask(made, 0).path == first.path and tree(first.path) == before and len(study(made)) == 1
    second, third = ask(made, 1), ask(made, 2)
    end(first, "finished", 0.75)
    end(second, "failed", code=4, cause="loss", next="end")
    end(third, "failed", code=4, cause="killed", next="requeue")
    ask(made, 3)
    assert [(trial.state.name, trial.value) for trial in study(made)] == [
        ("COMPLETE", 0.75), ("FAIL", None), ("RUNNING", None), ("RUNNING", None),
    ]  # fmt: skip
    # The same command: what failed by its own fault is replaced, what was killed goes on, what waits is left alone.
    queue(bin, "100_3 RUNNING")
    again = sweep(search=SEARCH, trials=4, max_parallel=2, directory="search it's")
    assert array_of(submitted()[-1]) == "2,4%1" and again.record.cells[-1].name == "trial-004"
    assert len(prepared) == 2
    table = again.table()
    assert table.rows[0].point == "trial-000" and table.best is not None
    assert float(table.best.overrides["train.learning_rate"]) == pytest.approx(
        plan.recipe.train.learning_rate, rel=1e-5
    )
    assert "Best of 1 finished: trial-000" in str(table)
    with pytest.raises(InputError, match="is a search of another space"):
        sweep(search=SEARCH[:1], trials=4, directory="search it's")


def test_a_search_that_prunes(sweep: Callable[..., Sweep], prepared: list[Any]) -> None:
    """Each trial gets what it is compared by; a pruned one counts with its value. What prunes nothing is refused."""
    rates = ["train.learning_rate=1e-5..1e-1:log"]
    options = {"search": rates, "trials": 3, "directory": "pruned", "prune": True}
    with pytest.raises(InputError, match=r"`train\.epochs` is searched, and trials of different lengths"):
        sweep(**{**options, "search": SEARCH})
    with pytest.raises(InputError, match="each is evaluated once, at its end"):
        sweep(**options)
    options["overrides"] = ["train.epochs=3"]
    made = sweep(**options)
    run = ask(made, 0)
    assert read_json(run.path / "pruning.json") == {"metric": "eval_accuracy", "lower": False}
    end(run, "finished", 0.25, pruned=True)
    end(ask(made, 1), "finished", 0.75)
    ask(made, 2)
    assert [(t.state.name, t.value) for t in study(made)][:2] == [("COMPLETE", 0.25), ("COMPLETE", 0.75)]
    table = made.table()
    assert "Best of 2 finished, 1 of them pruned: trial-001" in str(table)
    shown = {line.split()[0]: line.split()[-1] for line in str(table).splitlines() if line.startswith("trial-")}
    assert (shown["trial-000"], shown["trial-001"]) == ("pruned", "finished")
    assert [row.get("pruned", False) for row in table.to_dict()["rows"]] == [False, True, False]
    with pytest.raises(InputError, match="was made with --prune"):
        sweep(**{**options, "prune": False})


def test_a_search_with_a_seed_is_repeatable_and_learns(sweep: Callable[..., Sweep]) -> None:
    """Trials one after another try the same values again, other ones with another seed; and come near the best."""
    tried: dict[str, list[float]] = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = sweep(search=["train.learning_rate=1e-6..1e-1:log"], trials=25, directory=name, search_seed=seed)
        rates = tried[name] = []
        for number in range(25 if name == "a" else 4):
            run = ask(made, number)
            rates.append(run.plan().recipe.train.learning_rate)
            off = abs(math.log10(rates[-1]) + 3)  # best at 1e-3
            end(run, "finished", 1 - off / 5)
    assert tried["a"][:4] == tried["b"] and tried["a"][:4] != tried["c"]
    assert len(set(tried["a"])) == 25

    def mean_distance(rates: list[float]) -> float:
        return sum(abs(math.log10(rate) + 3) for rate in rates) / len(rates)

    assert mean_distance(tried["a"][15:]) < 0.6 * mean_distance(tried["a"][:10]), tried["a"]


def test_a_search_survives_what_a_kill_leaves(sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn last line in the journal; a trial that was asked for and never claimed; one that makes no run."""
    from afina.worker.node import trial

    made = sweep(search=SEARCH[:1], trials=3, directory="s")
    with monkeypatch.context() as patch:
        patch.setattr(trial, "_claim", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ask(made, 0)
    with made.dir.journal.open("ab") as journal:
        journal.write(b'{"op_code":4,"worker_')
    lost = study(made)[0].params
    run = ask(made, 0)
    assert run.plan().recipe.train.learning_rate == lost["train.learning_rate"] and len(study(made)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(trial, "geometry_for", lambda *_, **__: (_ for _ in ()).throw(InputError("does not divide", "")))
        with pytest.raises(InputError):
            trial.answer([str(made.dir.run("trial-001").path)])
    assert [t.state.name for t in study(made)] == ["RUNNING", "FAIL"] and not made.dir.run("trial-001").path.exists()
    ask(made, 1)
    assert len(study(made)) == 3


def test_many_ask_at_once(sweep: Callable[..., Sweep]) -> None:
    """Processes that ask at the same moment get trials of their own."""
    made = sweep(search=SEARCH[:1], trials=4, directory="s")
    argv = [os.fsdecode(word) for word in (made.path / "trial.argv").read_bytes().split(b"\0")[:-1]]
    runs = [made.dir.run(cell.name) for cell in made.record.cells]
    asking = [subprocess.Popen([*argv, str(run.path)], stdout=subprocess.DEVNULL) for run in runs]
    assert [process.wait(timeout=120) for process in asking] == [0] * 4
    assert len({run.plan().recipe.train.learning_rate for run in runs}) == 4
    assert sorted(t.user_attrs["cell"] for t in study(made)) == [run.path.name for run in runs]


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


# -- folds -----------------------------------------------------------------------------------------------------------


def _predicted(run: RunDir, rows: range, *, always: str = "") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["yx"[row % 2] for row in rows]
    sure = [0.1 if row == 3 else 0.9 - row / 100 for row in rows]  # that the label is right: of row 3 it is wrong
    x = [p if name == "x" else 1 - p for name, p in zip(names, sure, strict=True)]
    table = {"row": list(rows), "file": pa.array(["a.csv"] * len(rows)).dictionary_encode(), "label": names}
    texts = ["=1+1" if row == 7 else f"text\n<{row}>" for row in rows]
    table |= {"text": texts, "prediction": [always or ("x" if p > 0.5 else "y") for p in x]}
    pq.write_table(pa.table({**table, "score: x": x, "score: y": [1 - p for p in x]}), run.predictions)


def test_folds_are_one_array_over_one_store_and_one_table_of_all_rows(
    sweep: Callable[..., Sweep], prepared: list[Any], submitted: Callable[[], list[list[str]]]
) -> None:
    import pyarrow.parquet as pq

    made = sweep(folds=2, repeats=2)
    assert len(prepared) == 1 and [array_of(words) for words in submitted()] == ["0-3"]
    assert [cell.name for cell in made.record.cells] == [f"repeat={r},fold={n}" for r in (1, 2) for n in (1, 2)]
    runs = [made.dir.run(cell.name) for cell in made.record.cells]
    assert [run.prepared()["rows"] for run in runs] == [
        {"train": train, "eval": 10 - train, "test": 3} for train in (6, 4, 5, 5)
    ]
    for run, score, rows in zip(runs, (0.8, 0.9, 0.7, 0.8), ((0, 4), (4, 10), (0, 5), (5, 10)), strict=True):
        end(run, "finished", score, next="end")
        _predicted(run, range(*rows))
    table = made.table()
    (row,) = table.rows
    assert row.values == {1: 0.8, 2: 0.9, 3: 0.7, 4: 0.8} and row.interval is not None and row.interval.low is not None
    half = 3.1824463 * float(np.std([0.8, 0.9, 0.7, 0.8], ddof=1)) * math.sqrt(1 / 4 + 1)
    assert row.interval.mean - row.interval.low == pytest.approx(half)
    assert row.interval.mean + half > 1 and row.interval.high == 1, "no accuracy is more"
    assert (
        "Nadeau and Bengio" in str(table)
        and "  folds × repeats  " in str(table)
        and "out_of_fold.parquet" in str(table)
    )
    assert pq.read_table(made.dir.out_of_fold).select(["repeat", "fold", "row"]).to_pydict() == {
        "repeat": [1] * 10 + [2] * 10,
        "fold": [1] * 4 + [2] * 6 + [1] * 5 + [2] * 5,
        "row": [*range(10)] * 2,
    }
    first, *others = table.doubtful
    assert (first["row"], first["label"], first["suggested"], first["probability"], first["issue"]) == (
        "3",
        "x",
        "y",
        "0.1000",
        "yes",
    )
    assert [row["row"] for row in others] == list("987654210"), "those without an issue by their probability"
    assert "a.csv:3  x      y          0.1000    text <3>" in str(table) and table.to_dict()["doubtful"][0] == first
    corrected = made.dir.doubtful.read_text().replace("yes,", "yes,y", 1).replace(",", ";").encode("cp1252", "replace")
    made.dir.doubtful.write_bytes(corrected)  # as a spreadsheet saves it
    assert made.table().doubtful[0] == first and made.dir.doubtful.read_bytes() == corrected
    for texts in (True, False):
        charts, page = collection_page(made.path, [run.path for run in runs], made.path / "report", texts=texts)
        html = page(dict.fromkeys((chart.key for chart in charts), ""))
        assert "Northcutt" in html and ("&lt;3&gt;" in html) == texts and "<3>" not in html
    _predicted(runs[0], range(4))
    kept = made.path / "doubtful_labels.1.csv"
    assert f"the file of before is kept: {kept}" in str(made.table()) and kept.read_bytes() == corrected
    with made.dir.doubtful.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {**first, "correct_label": ""} and "'=1+1" in [row["text"] for row in rows]
    for run, rows_of in zip(runs, ((0, 4), (4, 10), (0, 5), (5, 10)), strict=True):
        _predicted(run, range(*rows_of), always="x")
    assert "Labels that models of no use doubt" in str(made.table())
    _predicted(runs[0], range(5))
    with pytest.raises(DataError, match="not every row is predicted once in each of 2 repeats"):
        made.table()
    with pytest.raises(InputError, match="was made with --folds 2"):
        sweep(GRID, directory=made.path)
    assert len(sweep(folds=2, repeats=3, directory=made.path).record.cells) == 6


def test_two_cross_validations_are_compared_over_the_same_folds(sweep: Callable[..., Sweep]) -> None:
    sweeps = [sweep(folds=3, overrides=[f"train.learning_rate={rate}"]) for rate in ("1e-3", "2e-3")]
    assert sweeps[0].path != sweeps[1].path and sweeps[0].path.name.endswith("-3-folds")
    scores = [(0.8, 0.9, 0.7), (0.81, 0.93, 0.74)]
    truth, logits = np.array([0, 1, 0, 1, 1]), np.eye(2)[[0, 1, 0, 1, 0]]
    for made, values in zip(sweeps, scores, strict=True):
        for number, (cell, value) in enumerate(zip(made.record.cells, values, strict=True)):
            run = made.dir.run(cell.name)
            end(run, "finished", value, next="end")
            write(run.predictions, "single-label", truth, logits, [f"text {number} {i}" for i in range(5)])
    comparison = compare([made.path for made in sweeps])
    (verdict,) = comparison.tests()
    assert verdict.paired is not None and verdict.paired.rows == 15 and verdict.run == sweeps[1].path.name
    assert compare_page.test_rows([verdict])[2] == [
        "Difference: run minus the first.",
        "The tests over folds cover sampling of rows, those of train too; all runs have one seed.",
    ]
    first = verdict.paired.differences[0]
    expected = paired_t_test(scores[1], scores[0], overlap=1 / 2)
    assert (first.metric, first.p, first.low) == ("accuracy", expected.p, expected.difference.low)
    assert (first.first, first.second) == (pytest.approx(0.8), pytest.approx(0.8266667))
    charts, page = collection_page(sweeps[0].path, [run.path for run in sweeps[0].runs], sweeps[0].path / "report")
    html = page(dict.fromkeys((chart.key for chart in charts), ""))
    assert "mean of 3 folds" in html and "Means over folds, the best first" in html and "Nadeau and Bengio" in html
    write(sweeps[1].dir.run("repeat=1,fold=2").predictions, "single-label", truth, logits, ["another text"] * 5)
    (verdict,) = compare([made.path for made in sweeps]).tests()
    assert verdict.paired is None and "the eval rows differ" in (verdict.why_not or "")
    (alone,) = compare([sweeps[0].path]).tests()
    assert "folds of one training" in (alone.why_not or "")


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--folds", "3", "--seeds", "2"], "cannot be combined with --grid, --search or --seeds"),
        (["--folds", "3", "--grid", GRID], "scored too kindly"),
        (["--folds", "3", "--search", "train.learning_rate=1e-6..1e-4:log"], "choose the setting first"),
        (["--repeats", "2", "--seeds", "2"], "--repeats: has no effect without --folds"),
        (["--folds", "3", "--set", "data.fold={of: 3, number: 1}"], "is also given by --set"),
    ],
)
def test_folds_of_more_than_one_setting_are_refused(
    command: Callable[..., Ran], recipe_file: Callable[..., Path], scratch: Path, words: list[str], reason: str
) -> None:
    ran = command("sweep", str(recipe_file()), *words, env={"AFINA_SCRATCH": str(scratch)})
    assert ran.returncode == 2 and reason in ran.stderr, ran.stderr
    assert not list(scratch.glob("sweeps/*"))
