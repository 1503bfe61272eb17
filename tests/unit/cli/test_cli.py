from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.unit.conftest import Ran

from afina import __version__
from afina.errors import Failure
from afina.recipe.schema import Recipe
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.outcome import Outcome
from afina.run.plan import make_plan
from afina.site.settings import Site

COMMANDS = ["train", "resume", "submit", "prefetch", "status", "list", "logs", "cancel", "report", "compare", "rerun"]


@pytest.fixture
def run(recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site, tmp_path: Path) -> RunDir:
    plan = make_plan(recipe(), site, recipe_file=recipe_file())
    return claim(plan, {}, ["false"], "", tmp_path / "r; un it's")


def test_version_and_help(afina: Callable[..., Ran]) -> None:
    done = afina("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"afina, version {__version__}\n", "")
    done = afina("--help")
    assert done.returncode == 0 and done.stderr == ""
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout
    assert "Exit codes: 0 finished" in done.stdout and "\n  claim" not in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example(command: Callable[..., Ran], name: str) -> None:
    done = command(name, "--help")
    assert done.returncode == 0 and f"afina {name} " in done.stdout and "Example" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 120


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian"],
        ["train"],
        ["train", "r.yaml", "--no-such-option"],
        ["train", "r.yaml", "--num-processes", "0"],
        ["train", "r.yaml", "--num-processes", "two"],
        ["submit", "r.yaml", "--via", "pbs"],
        ["submit", "r.yaml", "--nodes", "0"],
        ["submit", "r.yaml", "--gpus-per-node", "-1"],
        ["status", "--no-such-option"],
        ["list", "--sort", "color"],
        ["list", "--state", "broken"],
        ["logs"],
        ["logs", "r", "--rank", "-1"],
        ["cancel"],
        ["resume"],
    ],
)
def test_a_wrong_command_line_is_the_users_input(command: Callable[..., Ran], arguments: list[str]) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr and done.stdout == ""
    assert "Usage: " in done.stderr


@pytest.mark.parametrize("time", ["abc", "0", "-1", "1:2:3:4", "²", ""])
def test_wrong_time_limits(command: Callable[..., Ran], recipe_file: Callable[..., Path], time: str) -> None:
    done = command("submit", recipe_file(), "--dry-run", f"--time={time}")
    assert done.returncode == 2 and done.stderr.startswith(f"error: --time {time}: "), done
    assert "remedy: for example --time 90 or --time 2:30:00" in done.stderr


@pytest.mark.parametrize(("time", "minutes"), [("90", 90), ("1:30:00", 90), ("1-0", 1440), ("0:59", 1)])
def test_time_limits(command: Callable[..., Ran], recipe_file: Callable[..., Path], time: str, minutes: int) -> None:
    done = command("submit", recipe_file(), "--dry-run", "--json", "--time", time)
    assert json.loads(done.stdout)["plan"]["recipe"]["resources"]["time"] == minutes


def test_overrides_reach_the_plan(command: Callable[..., Ran], recipe_file: Callable[..., Path]) -> None:
    words = ["submit", recipe_file(), "--dry-run", "--json", "--set", "train.learning_rate=3e-5", "--set"]
    assert command(*words, "name=a, b: 'c'").returncode == 2, "a mapping is not a name"
    done = command(*words, "name=é ☃")
    plan = json.loads(done.stdout)["plan"]
    assert (plan["recipe"]["train"]["learning_rate"], plan["recipe"]["name"]) == (3e-5, "é ☃")


def test_the_site_option_wins(command: Callable[..., Ran], recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    other = tmp_path / "other scratch"
    other.mkdir()
    (tmp_path / "s i.env").write_text(f'AFINA_SCRATCH="{other}"\n')
    done = command("submit", recipe_file(), "--dry-run", "--json", "--site", tmp_path / "s i.env")
    assert json.loads(done.stdout)["plan"]["site"]["scratch"] == str(other), done.stderr


def test_status(command: Callable[..., Ran], run: RunDir) -> None:
    done = command("status", run.path, "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and (answer["state"], answer["step"], answer["job_id"]) == ("PLANNED", 0, None)
    run.begin_attempt("local-1")
    run.append("metrics.jsonl", {"step": 7, "loss": 0.5})
    run.record(
        Outcome(outcome="finished", exit_code=0, attempt="local-1", global_step=7, metrics={"eval_accuracy": 0.75})
    )
    done = command("status", run.path)
    assert done.stdout == f"FINISHED  step 7  job -  {run.path}\n  loss 0.5000\n  eval_accuracy 0.750000\n"


def test_status_of_a_failure(command: Callable[..., Ran], run: RunDir) -> None:
    run.record_failure("local-1", Failure("TrainingError", "the loss is not finite", "a smaller train.learning_rate"))
    done = command("status", run.path)
    assert done.returncode == 0 and done.stdout.startswith("FAILED  step 0")
    assert "the loss is not finite" in done.stdout and "remedy: " in done.stdout


@pytest.mark.parametrize("name", ["status", "resume", "list", "logs", "cancel"])
def test_not_a_run_directory(command: Callable[..., Ran], tmp_path: Path, name: str) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / ("long" * 100)):
        done = command(name, path)
        assert done.returncode in (2, 3) and "Traceback" not in done.stderr and "remedy: " in done.stderr, done


def test_resuming_what_is_finished_is_no_error(command: Callable[..., Ran], run: RunDir) -> None:
    run.begin_attempt("local-1")
    run.record(Outcome(outcome="finished", exit_code=0, attempt="local-1"))
    done = command("resume", run.path)
    assert done.returncode == 0 and done.stdout.startswith(f"afina: finished: {run.path}\nnext: afina report ")
    assert run.attempt_names() == ["local-1"]


def test_a_worker_that_cannot_start_is_the_environment(command: Callable[..., Ran], run: RunDir) -> None:
    (run.path / "worker.argv").write_bytes(b"/no/such/apptainer\0exec\0")
    done = command("resume", run.path)
    assert done.returncode == 3 and done.stderr.startswith("error: /no/such/apptainer: No such file"), done
    assert "AFINA_RUNTIME=none" in done.stderr


@pytest.mark.parametrize("code", [4, 3])
def test_a_worker_that_dies_gets_an_outcome(command: Callable[..., Ran], run: RunDir, code: int) -> None:
    (run.path / "worker.argv").write_bytes(b"\0".join([b"bash", b"-c", b"echo last words; exit %d" % code, b""]))
    done = command("resume", run.path)
    outcome = run.outcome()
    assert done.returncode == code and outcome is not None and outcome.outcome == "failed"
    assert "last words" in done.stdout and "| last words" in done.stderr and "remedy: " in done.stderr
    assert (run.attempts / "local-1/node0.log").read_text() == "last words\n"


def test_the_workers_outcome_is_the_exit_code(afina: Callable[..., Ran], run: RunDir) -> None:
    """accelerate ends with 1 whatever its workers end with: the code that the worker wrote counts."""
    script = (
        "import sys; from afina.run.directory import RunDir; from afina.run.outcome import Outcome;"
        "RunDir(sys.argv[1]).record(Outcome(outcome='stopped', exit_code=75, attempt='local-1', global_step=3));"
        "sys.exit(1)"
    )
    words = [sys.executable, "-c", script, str(run.path), ""]
    (run.path / "worker.argv").write_bytes(b"\0".join(os.fsencode(w) for w in words))
    done = afina("resume", run.path, "--json")
    assert done.returncode == 75
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["outcome"], answer["global_step"], answer["run"]) == ("stopped", 3, str(run.path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_the_worker_to_stop(run: RunDir, scratch: Path, number: signal.Signals) -> None:
    body = 'echo up; for i in {1..200}; do [ -e "$1/stop" ] && exit 0; sleep 0.05; done; exit 9'
    words = ["bash", "-c", body, "bash", str(run.path), ""]
    (run.path / "worker.argv").write_bytes(b"\0".join(os.fsencode(w) for w in words))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "afina", "resume", str(run.path)],
        env={**os.environ, "AFINA_SCRATCH": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert run.stop_file.exists() and process.returncode == 4 and "Traceback" not in errors, errors
    assert ("Ctrl-C again" in errors) is (number == signal.SIGINT)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["--help", "status"])
def test_output_that_is_not_taken(run: RunDir, unbuffered: str, arguments: str) -> None:
    """A reader that has gone and a closed output are no failure; a full disk is one, with a remedy."""
    env = {**os.environ, "AFINA_SCRATCH": str(run.path.parent), "PYTHONUNBUFFERED": unbuffered}

    def ran(script: str) -> tuple[int, str]:
        argv = ["bash", "-o", "pipefail", "-c", script, sys.executable, arguments]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    afina = '"$0" -m afina $1'
    assert (
        ran(f"{afina} | true") == ran(f"{afina} | head -n 1") == ran(f"{afina} >&-") == ran(f"{afina} 2>&-") == (0, "")
    )
    full = "error: No space left on device: the output cannot be written whole\n  remedy: free space where it goes\n"
    assert ran(f"{afina} >/dev/full") == (3, full)
    assert ran('"$0" -m afina nosuch >/dev/full')[0] == 2


def test_a_locale_that_is_not_utf8(tmp_path: Path) -> None:
    """The file of that name is found, and its name printed."""
    folder = tmp_path / "café ☃"
    folder.mkdir()
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    argv = [sys.executable, "-m", "afina", "status", str(folder)]
    done = subprocess.run(argv, env=env, capture_output=True, check=False)
    assert done.returncode == 2 and f"{folder}: not a run directory".encode() in done.stderr, done.stderr
