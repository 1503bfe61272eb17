"""`afina logs`: which attempt, node and rank; the end of a log; following from attempt to attempt."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import program
from tests.unit.conftest import Ran

from afina.errors import InputError
from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.watch.logs import LogSelection, follow, log_lines
from afina.worker.training.log import mark_lines


@pytest.fixture
def run(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of two nodes with two processes each, of which no attempt has begun. No Slurm answers."""
    for name in ("squeue", "sacct"):
        program(tmp_path / "fake slurm", name, "exit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'fake slurm'}:{os.environ['PATH']}")
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    path = scratch / "runs" / "r"
    (path / "attempts").mkdir(parents=True)
    (path / "plan.json").write_text(json.dumps({"geometry": {"nodes": 2, "processes_per_node": 2}}))
    return RunDir(path)


def begin(run: RunDir, attempt: str, *logs: str) -> Path:
    folder = run.begin_attempt(attempt)
    run.event("attempt_started", attempt=attempt)
    for node, text in enumerate(logs):
        (folder / f"node{node}.log").write_text(text)
    return folder


NODE_0 = "epoch 1\n[rank 1] error: rank 1: no\n[rank 1]   trace\nepoch 2\n"
NODE_1 = "[rank 2] hello\n[rank 3] hallo\nNCCL WARN\n"


@pytest.mark.parametrize(
    ("choice", "last", "said"),
    [
        (LogSelection(), None, NODE_0),
        (LogSelection(), 1, "epoch 2\n"),
        (LogSelection(), 0, ""),
        (LogSelection(rank=0), None, "epoch 1\nepoch 2\n"),
        (LogSelection(rank=1), None, "error: rank 1: no\n  trace\n"),
        (LogSelection(rank=1), 1, "  trace\n"),
        (LogSelection(rank=3), None, "hallo\n"),
        (LogSelection(node=1), None, NODE_1),
        (LogSelection(attempt="7.0"), None, "the first\n"),
    ],
)
def test_which_lines(run: RunDir, choice: LogSelection, last: int | None, said: str) -> None:
    begin(run, "7.0", "the first\n", "")
    begin(run, "7.1", NODE_0, NODE_1)
    assert "".join(log_lines(run, choice, last)) == said


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (LogSelection(attempt="7.2"), r"there is no attempt 7\.2; there are: 7\.0, 7\.1"),
        (LogSelection(rank=4), r"there is no rank 4: attempt 7\.1 has 4 process"),
        (LogSelection(node=2), r"there is no node 2: attempt 7\.1 has 2"),
    ],
)
def test_what_is_not_there(run: RunDir, choice: LogSelection, message: str) -> None:
    begin(run, "7.0", "")
    begin(run, "7.1", "")
    with pytest.raises(InputError, match=message):
        list(log_lines(run, choice))


def test_the_geometry_is_that_of_the_attempt(run: RunDir) -> None:
    folder = begin(run, "7.0", "[rank 1] one\n[rank 2] two\n")
    (folder / "env.json").write_text(json.dumps({"geometry": {"nodes": 1, "processes_per_node": 3}}))
    assert list(log_lines(run, LogSelection(rank=2))) == ["two\n"]


def test_before_the_first_attempt_it_is_slurms_log(run: RunDir, command: Callable[..., Ran]) -> None:
    done = command("logs", "r")
    assert done.returncode == 2 and "no attempt has begun, there is no log (PLANNED)" in done.stderr, done
    assert "remedy: afina submit " in done.stderr
    run.append("submissions.jsonl", {"job_id": "12", "via": "sbatch"})
    (run.path / "slurm-12.out").write_text("error: AFINA_IMAGE is not the image\n")
    done = command("logs", run.path)
    assert done.returncode == 0 and "slurm-12.out" in done.stdout and "AFINA_IMAGE is not the image" in done.stdout


def test_rank_and_node_together_are_refused(run: RunDir, command: Callable[..., Ran]) -> None:
    begin(run, "7.0", "x\n")
    done = command("logs", "r", "--rank", "1", "--node", "0")
    assert done.returncode == 2 and "--rank and --node: give one of them" in done.stderr
    assert command("logs", "r", "-n", "5").stdout == "x\n"


def test_a_folder_of_several_runs_is_no_run(run: RunDir, command: Callable[..., Ran]) -> None:
    (run.path.parent / "q").mkdir()
    (run.path.parent / "q/plan.json").write_text("{}")
    done = command("logs", run.path.parent)
    assert done.returncode == 2 and "holds 2 runs" in done.stderr and "name one of them: q, r" in done.stderr


def test_following_goes_on_through_a_requeue_until_the_end(run: RunDir) -> None:
    """Written by another thread as a job writes it: in pieces that end within a line and within a letter."""
    begin(run, "7.0", "before\n", "")

    def write(attempt: str, text: bytes) -> None:
        with (run.attempts / attempt / "node0.log").open("ab", buffering=0) as log:
            for start in range(0, len(text), 3):
                log.write(text[start : start + 3])
                time.sleep(0.002)

    def live() -> None:
        time.sleep(0.1)
        write("7.0", "step 1 ☃\nstep 2\n".encode())
        run.record(Outcome(outcome="stopped", exit_code=75, attempt="7.0", cause="signal"))
        run.event("attempt_ended", attempt="7.0", next="requeue")
        time.sleep(0.1)
        begin(run, "7.1", "")
        write("7.1", b"[rank 1] from rank 1\nstep 3\nno line break")
        run.record(Outcome(outcome="finished", exit_code=0, attempt="7.1"))

    writer = threading.Thread(target=live)
    writer.start()
    said = list(follow(run, LogSelection(), 1, pause=lambda _: time.sleep(0.01)))
    writer.join()
    assert "".join(said) == (
        "before\nstep 1 ☃\nstep 2\nafina: attempt 7.0 has ended (stopped: signal); attempt 7.1 continues\n"
        "[rank 1] from rank 1\nstep 3\nno line break\nafina: FINISHED\n"
    )


def test_following_one_attempt_ends_with_it(run: RunDir) -> None:
    begin(run, "7.0", "one\n")
    begin(run, "7.1", "two\n")
    said = list(follow(run, LogSelection(attempt="7.0"), pause=lambda _: pytest.fail("there is nothing to wait for")))
    assert said[0] == "one\n" and "two\n" not in said


def test_ctrl_c_ends_it_without_a_message(run: RunDir) -> None:
    begin(run, "7.0", "one\n")
    run.append("submissions.jsonl", {"job_id": "7", "via": "sbatch"})
    argv = [sys.executable, "-W", "error", "-m", "afina", "logs", "r", "-f"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "one\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 0


def test_waiting_for_the_first_attempt(run: RunDir, tmp_path: Path) -> None:
    program(tmp_path / "fake slurm", "squeue", f"echo {shlex.quote('7|7|PENDING|1:00|N/A||Priority')}\n")
    run.append("submissions.jsonl", {"job_id": "7", "via": "sbatch"})
    looks = []

    def pause(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            begin(run, "7.0", "begun\n")
            run.record(Outcome(outcome="finished", exit_code=0, attempt="7.0"))

    assert list(follow(run, LogSelection(), pause=pause)) == ["begun\n", "afina: FINISHED\n"]


def test_ranks_mark_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    mark_lines(0)
    print("plain")
    mark_lines(3)
    print("two\nlines", end="")
    assert out.getvalue() == "plain\n[rank 3] two\n", "a line that is not finished waits"
    print(" and more")
    sys.stderr.write("torn")
    sys.stderr.flush()
    assert out.getvalue() == "plain\n[rank 3] two\n[rank 3] lines and more\n" and err.getvalue() == "[rank 3] torn\n"
