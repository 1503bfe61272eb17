"""Trainings in the user's process: signals, failures, readers that go away, what leaks into it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import tiny
from tests.unit.api.conftest import STOPS

import afina
from afina.run.directory import RunDir

LOOP = """
import sys, afina
from afina import api
seen = []
for path in sys.argv[1:]:
    try:
        afina.resume(path)
    except KeyboardInterrupt:
        print("interrupted"); break
    except SystemExit as ended:
        print("exit", ended.code); break
    except afina.AfinaError as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize(("number", "answer"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "exit 143\n")])
def test_a_signal_ends_the_loop_that_trains_and_not_one_training(
    claim: Callable[..., RunDir], scratch: Path, number: signal.Signals, answer: str
) -> None:
    runs = [claim(name, worker=STOPS).path for name in ("a", "b")]
    argv = [sys.executable, "-c", LOOP, *map(str, runs)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert output == answer and "Traceback" not in errors
    assert not RunDir(runs[1]).attempt_names(), "the next training began"


def test_a_training_that_fails_raises_unless_told_otherwise(claim: Callable[..., RunDir]) -> None:
    with pytest.raises(afina.Failed, match="exit code 4"):
        afina.resume(claim("a", worker="exit 4").path)
    assert afina.resume(claim("b", worker="exit 4").path, check=False).state == "FAILED"


def test_a_reader_that_goes_away_does_not_stop_a_training(claim: Callable[..., RunDir]) -> None:
    """More than a pipe holds, and a sign that ASCII lacks; the log has it all."""
    worker = 'for i in {1..3000}; do echo "line $i of a long log: 3 × 4, and more of it"; done; exit 4'
    for name, ending in (("a", "| head -n 1"), ("b", ">&-"), ("c", "")):
        run = claim(name, worker=worker)
        code = f"import afina; afina.resume({str(run.path)!r}, check=False)"
        env = {**os.environ, "PYTHONIOENCODING": "ascii"}
        command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {ending}"
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=60, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        log = (run.attempts / "local-1/node0.log").read_text("utf-8")
        assert len(log.splitlines()) == 3000 and "3 × 4" in log
        assert run.outcome() is not None


def test_a_launchers_variables_do_not_reach_the_worker() -> None:
    from afina.run.commands import without_launcher

    names = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID PET_NNODES ACCELERATE_USE_FSDP OMPI_COMM_WORLD_SIZE"
    kept = {"OMP_NUM_THREADS": "1", "PATH": "/bin", "SLURM_JOB_ID": "7"}
    assert without_launcher({**dict.fromkeys(names.split(), "3"), **kept}) == kept


@pytest.mark.timeout(240)
def test_a_training_beside_files_named_like_libraries_in_a_launchers_shell(
    afina_in: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    recipe = tiny.write_project(tmp_path / "project", rows=60, train={"max_steps": 2})
    for name in ("datasets", "evaluate", "tokenizers", "accelerate", "transformers", "torch", "random", "sklearn"):
        (recipe.parent / f"{name}.py").write_text("import os; os._exit(99)\n")
    launcher = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}
    env = {**launcher, "TORCHELASTIC_RUN_ID": "x", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    for processes in ("1", "2"):
        done = afina_in(recipe.parent, "train", recipe, "--num-processes", processes, env=env)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def afina_in(scratch: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the `afina` command in a folder, as a user does: the script, which does not put the folder on the path."""

    def run(folder: Path, *words: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).with_name("afina")), *map(str, words)]
        given = {**os.environ, "AFINA_SCRATCH": str(scratch), **env}
        return subprocess.run(argv, cwd=folder, env=given, capture_output=True, text=True, timeout=200, check=False)

    return run
