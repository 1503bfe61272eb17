"""The door between host and worker: real processes that answer, fail, are killed, and lose their caller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tests.processes import wait_until

from afina.errors import AfinaError, EnvironmentProblem, Failure
from afina.processes import start_time
from afina.run.workers import ask_worker, ask_workers, follow_worker
from afina.worker.__main__ import ANSWERS, PROCESSES

WORKER = """
import os, pathlib, sys, time
from afina.errors import EnvironmentProblem
from afina.worker.disk_errors import disk_errors
from afina.worker.reply import read_question, reply, report

def work():
    question = read_question("a question of this test")
    if "pid" in question:
        pathlib.Path(f"{question['pid']}.{os.getpid()}").write_text(str(os.getpid()))
        os.rename(f"{question['pid']}.{os.getpid()}", question["pid"])
    for number in range(question.get("reports", 0)):
        print("a library prints this"); print("[1]")
        report({"number": number})
    if question["do"] == "fail":
        raise EnvironmentProblem("no room for hf_" + 20 * "a", "free some", cause="disk", nodes=("n1", "n2"))
    if question["do"] == "fill the disk":
        with open("/dev/full", "w") as file: file.write(100_000 * "x")
    if question["do"] == "break":
        raise IndexError("index 7 is out of range")
    if question["do"] == "die":
        os.kill(os.getpid(), 9)
    if question["do"] == "wait":
        time.sleep(60)
    return {"done": question["do"]}

sys.exit(reply(work, as_json="--json" in sys.argv))
"""
ARGV = [sys.executable, "-W", "error", "-c", WORKER]


def ask(**question: Any) -> dict[str, Any]:
    return ask_worker(ARGV, os.environ, question, name="the worker")


def start(**question: Any) -> subprocess.Popen[str]:
    process = subprocess.Popen(ARGV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(question))
    process.stdin.close()
    process.stdin = None  # or `communicate` would flush it
    return process


def pid_in(path: Path) -> int:
    wait_until(path.exists)
    return int(path.read_text())


def test_an_answer_and_what_is_reported_before_it() -> None:
    received: list[tuple[int, Any]] = []
    questions = {"do": "it", "reports": 3}
    answers = ask_workers(
        [ARGV] * 2, [os.environ] * 2, questions, name="", on_progress=lambda *one: received.append(one)
    )
    assert answers == [{"done": "it"}] * 2
    assert sorted((number, answer["number"]) for number, answer in received) == [
        (k, n) for k in range(2) for n in range(3)
    ]
    assert [answer["number"] for answer in follow_worker(ARGV, os.environ, questions, name="")] == [0, 1, 2]


def test_a_failure_arrives_with_all_its_parts_and_without_secrets() -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        ask(do="fail", reports=1)
    assert caught.value.failure == Failure("EnvironmentProblem", "no room for ***", "free some", "disk", ("n1", "n2"))
    with pytest.raises(EnvironmentProblem, match="no room"):
        list(follow_worker(ARGV, os.environ, {"do": "fail"}, name=""))


def test_a_full_disk_is_one_message() -> None:
    with pytest.raises(EnvironmentProblem, match="No space left on device") as caught:
        ask(do="fill the disk")
    assert caught.value.cause == "disk" and "quota" in caught.value.remedy


def test_a_worker_that_dies_or_cannot_start() -> None:
    with pytest.raises(EnvironmentProblem, match="the worker was killed by signal 9 without an answer") as caught:
        ask(do="die")
    assert "out of memory" in caught.value.remedy
    with pytest.raises(EnvironmentProblem, match=r"no\.program: No such file") as caught:
        ask_worker(["no.program"], os.environ, name="")
    assert "AFINA_RUNTIME=none" in caught.value.remedy
    with pytest.raises(EnvironmentProblem, match="this one ended with 0 without an answer"):
        ask_worker(["true"], os.environ, {"much": 200_000 * "x"}, name="this one")


def test_a_defect_names_what_was_done_and_what_broke(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AfinaError, match="the worker: IndexError: index 7 is out of range") as caught:
        ask(do="break")
    assert caught.value.exit_code == 1 and "see the lines above" in caught.value.remedy
    assert "Traceback" in capfd.readouterr().err


def test_the_others_are_ended_where_one_fails(tmp_path: Path) -> None:
    code = f"import os, sys; sys.argv.append('--json'); exec({WORKER!r})"
    waits = [sys.executable, "-c", code.replace('question["do"]', '"wait"')]
    began = time.monotonic()
    with pytest.raises(EnvironmentProblem, match="no room"):
        ask_workers([waits, ARGV], [os.environ] * 2, {"do": "fail", "pid": str(tmp_path / "pid")}, name="")
    assert time.monotonic() - began < 30
    assert start_time(pid_in(tmp_path / "pid")) is None


def test_a_worker_is_ended_where_its_caller_stops_listening(tmp_path: Path) -> None:
    received = follow_worker(ARGV, os.environ, {"do": "wait", "reports": 1, "pid": str(tmp_path / "pid")}, name="")
    next(received)
    received.close()
    assert start_time(pid_in(tmp_path / "pid")) is None


def test_a_worker_ends_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    question = {"do": "wait", "pid": str(tmp_path / "pid")}
    code = (
        f"import os; from afina.run.workers import ask_worker; ask_worker({ARGV!r}, os.environ, {question!r}, name='')"
    )
    caller = subprocess.Popen([sys.executable, "-c", code])
    worker = pid_in(tmp_path / "pid")
    caller.kill()
    caller.wait()
    wait_until(lambda: start_time(worker) is None)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes_of_signals(tmp_path: Path, number: int, code: int) -> None:
    process = start(do="wait", pid=str(tmp_path / "pid"))
    pid_in(tmp_path / "pid")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "") and "Traceback" not in err


def test_exit_code_of_a_pipe_that_nobody_reads() -> None:
    process = start(do="it", reports=100_000)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) in (141, 143), "whichever is noticed first: the write, or the closed pipe"
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize(("error", "code"), [("BrokenPipeError", 141), ("KeyboardInterrupt", 130)])
def test_exit_code_where_sigterm_comes_after_an_interrupt(error: str, code: int) -> None:
    late = f"""
import os, sys
from afina.worker.reply import reply
def work(): raise {error}
code = reply(work, as_json=True)
os.kill(os.getpid(), 15)
sys.exit(code)
"""
    assert subprocess.run([sys.executable, "-c", late], stdout=subprocess.PIPE, check=False).returncode == code


def test_by_hand_a_failure_is_a_message() -> None:
    done = subprocess.run(ARGV, input="{", capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: standard input is not a question of this test: ")


def test_every_command_has_its_function() -> None:
    assert all(callable(import_module(module).answer) for module in ANSWERS.values())
    assert all(callable(import_module(module).main) for module in PROCESSES.values())
    done = subprocess.run([sys.executable, "-m", "afina.worker", "no"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "prepare|" in done.stderr
