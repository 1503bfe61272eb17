"""slurm/finetune.sbatch as a task of an array: the run, or the trial, of its number."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from tests.common import program
from tests.unit.slurm.conftest import in_job, sbatch

from afina.run.commands import job_scripts
from afina.run.directory import RunDir
from afina.run.new_run import claim


@pytest.fixture
def sweep(run: RunDir, tmp_path: Path) -> Path:
    """A sweep directory whose second cell is a run."""
    folder = tmp_path / "sweep; it's $(a) 100%"
    (folder / "runs").mkdir(parents=True)
    claim(run.plan(), {}, ["echo", "{run}"], "", folder / "runs/b, '2'", scripts=job_scripts())
    (folder / "cells").write_bytes(b"a\nb\0b, '2'\0")
    return folder


@pytest.mark.parametrize(("task", "first"), [("1", []), ("0", ["1"])])
def test_a_task_finds_its_run_in_the_sweep(
    slurm_commands: Path, sweep: Path, scratch: Path, bin: Path, task: str, first: list[str]
) -> None:
    """And is called by both numbers: the job id of one task is that of the whole array too, whatever Slurm is asked."""
    run = RunDir(sweep / "runs/b, '2'")
    asked = slurm_commands / "asked"
    program(
        bin,
        "squeue",
        f'printf "%s\\n" "$*" >>{shlex.quote(str(asked))}; case "$*" in *%T*) echo RUNNING ;; *%l*) echo 2:00 ;; esac\n',
    )
    body = f'printf "%s\\n" requeue "" again >{shlex.quote(str(run.attempts))}/"$AFINA_ATTEMPT"/next; echo 75 >{shlex.quote(str(run.attempts))}/"$AFINA_ATTEMPT"/exit'
    program(bin, "sbatch", f"env >{shlex.quote(str(slurm_commands / 'sbatch.env'))}; echo 4300\n")
    array = {"SLURM_JOB_ID": "4000", "SLURM_ARRAY_JOB_ID": "4000", "SLURM_ARRAY_TASK_ID": task, "FAKE_SRUN": body}
    done = sbatch(sweep, *first, env=in_job(scratch, **array))
    assert done.returncode == 75, done
    assert [path.name for path in run.attempts.iterdir()] == [f"4000_{task}.0"]
    assert (slurm_commands / "requeued").read_text() == f"4000_{task}\n"
    assert all(f"--jobs 4000_{task} " in line for line in asked.read_text().splitlines())
    # The requeue was refused: the job that goes on is none of the array, and is told nothing of it.
    assert "SLURM_ARRAY" not in (slurm_commands / "sbatch.env").read_text()
    assert [record["job_id"] for record in run.lines("submissions.jsonl")] == ["4300"]


def test_a_task_without_a_cell_is_refused(slurm_commands: Path, sweep: Path, scratch: Path) -> None:
    done = sbatch(sweep, env=in_job(scratch))
    assert done.returncode == 2 and "this is no array job" in done.stderr and "remedy: " in done.stderr
    done = sbatch(sweep, "7", env=in_job(scratch, SLURM_ARRAY_JOB_ID="4", SLURM_ARRAY_TASK_ID="2"))
    assert done.returncode == 2 and "has no cell 9" in done.stderr
    done = sbatch(sweep, env=in_job(scratch, SLURM_ARRAY_JOB_ID="4", SLURM_ARRAY_TASK_ID="0"))
    assert done.returncode == 3 and "is no longer a run directory" in done.stderr


def test_a_task_of_a_search_asks_for_its_trial_first(slurm_commands: Path, sweep: Path, scratch: Path) -> None:
    """The run that is not there yet is made by `trial.argv`; one that is there is not asked for again."""
    run = RunDir(sweep / "runs/b, '2'")
    aside, calls = sweep / "aside", sweep / "calls"
    run.path.rename(aside)
    words = ["bash", "-c", 'printf "%s\\n" "$1" >>"$0/calls" && mv "$0/aside" "$1"', str(sweep)]
    (sweep / "trial.argv").write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))
    body = f'echo 0 >{shlex.quote(str(run.attempts))}/"$AFINA_ATTEMPT"/exit'
    given = in_job(scratch, SLURM_ARRAY_JOB_ID="4", SLURM_ARRAY_TASK_ID="1", FAKE_SRUN=body)
    for _ in range(2):
        done = sbatch(sweep, env=given)
        assert done.returncode == 0, done
    assert calls.read_text() == f"{run.path}\n"
    (sweep / "trial.argv").write_bytes(b"bash\0-c\0echo 'error: no values' >&2; exit 2\0bash\0")
    run.path.rename(aside)
    done = sbatch(sweep, env=given)
    assert done.returncode == 2 and "no values" in done.stderr
