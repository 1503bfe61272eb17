"""`submit([…])`: unlike recipes, one job array for each size of job, all or nothing before the queue."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.common import program
from tests.unit.conftest import recipe_dict

import afina
from afina.errors import InputError, SlurmError
from afina.files import read_words
from afina.run import new_run
from afina.run.directory import RunDir


@pytest.fixture
def calls(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that answers 100, 101, …, and runs the file `sbatch` before; a line of `calls` for each submission."""
    folder, where = tmp_path / "bin", shlex.quote(str(tmp_path))
    answer = f'[ "$1" != --version ] || exit 0; printf "%s\\t" "$@" >>{where}/calls; echo >>{where}/calls\n'
    program(folder, "sbatch", f"{answer}. {where}/sbatch\necho $((99 + $(wc -l <{where}/calls)))\n")
    for name, body in (("squeue", f"cat {where}/queue\n"), ("srun", "exit 0\n"), ("scontrol", "exit 1\n")):
        program(folder, name, body)
    (tmp_path / "sbatch").touch()
    (tmp_path / "queue").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    Path("reviews.csv").write_text("text,stars\ngood,5\n")

    def prepare(plan: Any) -> dict[str, Any]:
        if plan.recipe.name == "bad data":
            raise InputError("the data is bad", "mend it")
        return {"prepared": "/prepared", "task": "single-label"}

    monkeypatch.setattr(new_run, "prepare", prepare)
    return tmp_path / "calls"


def recipes(*names: str, **resources: Any) -> list[dict[str, Any]]:
    return [recipe_dict(name=name, resources={"gpus_per_node": 0, **resources}) for name in names]


def runs_below(scratch: Path) -> list[Path]:
    return [path for kind in ("runs", "arrays") if (scratch / kind).exists() for path in (scratch / kind).iterdir()]


def test_alike_jobs_are_one_array_and_each_run_has_its_own_handle(calls: Path, scratch: Path) -> None:
    several = [*recipes("a", "it's ☃", time=10), *recipes("c", time=20)]
    several[1]["train"] = {**several[1]["train"], "learning_rate": 1e-3}
    plans = afina.submit(several, dry_run=True)
    assert [plan.recipe.name for plan in plans] == ["a", "it's ☃", "c"] and not runs_below(scratch)
    runs = afina.submit(several, slurm={"nice": 7})
    assert isinstance(runs, afina.Runs) and [run.job_id for run in runs] == ["100_0", "100_1", "101_0"]
    assert [run.dir.plan().recipe.name for run in runs] == ["a", "it's ☃", "c"]
    first, second = (line.rstrip("\t\n").split("\t") for line in calls.read_text().splitlines(keepends=True))
    assert {"--array=0-1", "--nice=7", "--time=10"} <= set(first) and {"--array=0", "--time=20"} <= set(second)
    home = Path(first[-1])
    assert home.parent == scratch / "arrays" and first[-2] == str(home / "finetune.sbatch")
    assert read_words(home / "cells") == [str(runs[0].path), str(runs[1].path)]
    (home / "logs/100_1.out").write_text("slurmstepd: error: no space\n")
    assert "no space" in (runs[1].summary.why or ""), "the log of a task is the run's"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda many: many.append(recipe_dict(name="bad data")), "the data is bad"),
        (lambda many: many.append({"name": "x"}), "model"),
        (lambda many: many.clear(), "the list is empty"),
        (lambda many: many.append("nowhere.yaml"), "no such file"),
    ],
)
def test_if_one_is_refused_nothing_is_left(
    calls: Path, scratch: Path, change: Callable[[list[Any]], None], message: str
) -> None:
    several: list[Any] = recipes("a", "b")
    change(several)
    with pytest.raises(afina.AfinaError, match=message):
        afina.submit(several)
    assert not calls.exists() and not runs_below(scratch)


@pytest.mark.parametrize(
    ("options", "name"), [({"run": "x"}, "run"), ({"via": "submitit"}, "via"), ({"via": "local"}, "via")]
)
def test_what_is_for_one_run_is_refused(calls: Path, options: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: "):
        afina.submit(recipes("a", "b"), **options)


def test_a_refused_array_leaves_the_queued_one_alone(calls: Path, scratch: Path, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text('case $* in *--time=20*) echo "Invalid qos" >&2; exit 1 ;; esac\n')
    with pytest.raises(SlurmError, match="Invalid qos"):
        afina.submit([*recipes("a", time=10), *recipes("b", time=20)])
    (run,) = afina.runs()
    assert run.job_id == "100_0" and len(list((scratch / "arrays").iterdir())) == 1


def test_an_array_whose_answer_was_lost_is_found_again(calls: Path, tmp_path: Path) -> None:
    """Its token is in the runs' intents, and its tasks are the runs."""
    (tmp_path / "sbatch").write_text('echo "Socket timed out" >&2; exit 1\n')
    with pytest.raises(SlurmError, match="may be in the queue all the same"):
        afina.submit(recipes("a", "b"))
    runs = afina.runs()
    assert len(runs) == 2
    token = json.loads((runs[0].path / "intent.json").read_text())["token"]
    (tmp_path / "queue").write_text(
        f"77|0|script|afina:{token}\n77_0|77|RUNNING|1:00|N/A|n1|\n77_1|78|PENDING|1:00|N/A||\n"
    )
    for run in runs:
        with pytest.raises(InputError, match=r"job 77_\d of this run is (RUNNING|PENDING)"):
            run.submit()
    assert sorted(str(run.job_id) for run in runs) == ["77_0", "77_1"]
    assert isinstance(RunDir(runs[0].path).job_ids(), tuple)


@pytest.mark.parametrize("first", [0, 7])
def test_a_deleted_run_of_an_array_is_found_by_its_task(calls: Path, tmp_path: Path, first: int) -> None:
    """The array's list names the run of each task, from `first` on where it is a sweep's later array."""
    gone, other = afina.submit(recipes("a", "b"))
    home = Path(calls.read_text().rstrip("\t\n").split("\t")[-1])
    (home / "cells").write_bytes(b"/another run\0" * first + (home / "cells").read_bytes())
    shutil.rmtree(gone.path)
    arguments = f"{home} {first}" if first else str(home)
    commands = "".join(f"100_{task}|{home}/finetune.sbatch {arguments}\n" for task in (0, 1))
    states = "".join(f"100_{task}|{200 + task}|PENDING|1:00|N/A||Resources\n" for task in (0, 1))
    (tmp_path / "queue").write_text(commands + states)
    assert gone.state == "PENDING" and "was deleted" in str(gone.summary.why)
    program(tmp_path / "bin", "scancel", f'echo "$@" >{shlex.quote(str(tmp_path))}/cancelled\n')
    assert gone.cancel().job_ids == ("100_0",) and (tmp_path / "cancelled").read_text() == "100_0\n"
    assert other.state == "PENDING" and other.job_id == "100_1"
