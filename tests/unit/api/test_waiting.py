"""Handles: what a run that did not finish raises, and waiting for many of them."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.common import program

import afina
from afina.errors import AfinaError, Failure, InputError, SlurmError
from afina.run.directory import RunDir
from afina.run.outcome import Outcome


def failure(kind: str, cause: str) -> Failure:
    return Failure(kind, "what went wrong", "mend it", cause)


@pytest.mark.parametrize(
    ("more", "kind", "code", "remedy"),
    [
        ({"outcome": "stopped", "cause": "limit"}, afina.Stopped, 75, "run.submit(), or `afina submit"),
        ({"outcome": "stopped", "cause": "asked"}, afina.Cancelled, 75, "run.submit(), or `afina submit"),
        ({"outcome": "failed", "failure": failure("TrainingError", "disk")}, afina.Failed, 4, "mend it; then run.submit()"),
        ({"outcome": "failed", "failure": failure("TrainingError", "loss")}, afina.Failed, 4, "mend it"),
        ({"outcome": "failed", "exit_code": 2, "failure": failure("DataError", "")}, afina.Failed, 2, "mend it; then run"),
        ({"outcome": "failed", "failure": Failure("TrainingError", "killed")}, afina.Failed, 4, "run.submit(), or `afina"),
    ],
)  # fmt: skip
def test_a_run_that_did_not_finish_raises_what_it_is(
    claim: Callable[..., RunDir], squeue: Path, more: dict[str, Any], kind: type[AfinaError], code: int, remedy: str
) -> None:
    run = afina.Run(claim(job="7", **more).path)
    assert run.done()
    with pytest.raises(kind) as caught:
        run.result()
    assert (caught.value.exit_code, isinstance(caught.value, AfinaError)) == (code, True)
    assert caught.value.remedy.startswith(remedy), caught.value.remedy
    assert type(run.exception()) is kind


def test_a_run_that_finished_and_one_that_was_never_submitted(claim: Callable[..., RunDir], squeue: Path) -> None:
    run = afina.Run(claim("a", outcome="finished", metrics={"eval_x": 1.0}).path)
    assert run.result().metrics == {"eval_x": 1.0} and run.exception() is None

    async def awaited() -> Outcome:
        return await run

    assert asyncio.run(awaited()) == run.outcome
    with pytest.raises(InputError, match="was never submitted"):
        afina.Run(claim("b").path).result()


def test_a_cancelled_await_ends_at_once(claim: Callable[..., RunDir], squeue: Path) -> None:
    """No thread goes on waiting, which asyncio would wait for at its end."""
    runs = [afina.Run(claim(name, job=job).path) for name, job in (("a", "1"), ("b", "2"))]
    squeue.write_text("1|1|RUNNING|1:00|N/A|n1|\n2|2|RUNNING|1:00|N/A|n1|\n")

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*runs), 0.5)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 20


def test_a_forked_child_waits_while_a_thread_of_its_parent_asks_slurm(
    claim: Callable[..., RunDir], squeue: Path
) -> None:
    """multiprocessing forks by default up to Python 3.13; the lock of the poller is not the parent's."""
    from afina.watch.wait import _POLLER

    run = afina.Run(claim(outcome="finished").path)
    with _POLLER._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads
        if (pid := os.fork()) == 0:
            os._exit(0 if run.wait() == "FINISHED" else 1)
        end = time.monotonic() + 30
        while (status := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.05)
        if status == (0, 0):
            os.kill(pid, signal.SIGKILL)
    assert status == (pid, 0)


def test_waiting_has_a_limit_of_its_own_kind(claim: Callable[..., RunDir], squeue: Path) -> None:
    run = afina.Run(claim(job="7").path)
    squeue.write_text("7|7|PENDING|1:00|N/A||Resources\n")
    for error in (TimeoutError, AfinaError, afina.WaitTimeout):
        with pytest.raises(error, match="still queued or running"):
            run.result(timeout=0.2)
    with pytest.raises(afina.WaitTimeout):
        run.wait(timeout_s=0.2)
    assert not run.done()


def test_without_squeue_nothing_is_waited_for(
    claim: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="squeue is not on PATH"):
        afina.Run(claim(job="7").path).result()


def test_many_waiting_handles_ask_slurm_as_often_as_one(claim: Callable[..., RunDir], squeue: Path) -> None:
    runs = afina.Runs(afina.Run(claim(f"run {n}", job=str(n)).path) for n in range(1, 21))
    squeue.write_text("".join(f"{n}|{n}|RUNNING|1:00|N/A|n1|\n" for n in range(1, 21)))
    threads = [threading.Thread(target=run.wait) for run in runs]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    time.sleep(2.5)
    for n, run in enumerate(runs, start=1):
        run.dir.begin_attempt(f"{n}.0")
        run.dir.record(Outcome(outcome="finished", exit_code=0, attempt=f"{n}.0"))
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    asked = (squeue.parent / "questions").read_text().split()
    assert len(asked) <= 4 + (time.monotonic() - began) / 0.5, asked
    (squeue.parent / "questions").unlink()
    assert [run.path for run in afina.wait(runs)] == [run.path for run in runs]
    assert not (squeue.parent / "questions").exists(), "finished runs need no question"


def test_runs_are_cancelled_with_one_command(claim: Callable[..., RunDir], squeue: Path) -> None:
    runs = afina.Runs(afina.Run(claim(f"run {n}", job=str(n)).path) for n in range(1, 6))
    squeue.write_text("".join(f"{n}|{n}|PENDING|1:00|N/A||Resources\n" for n in range(1, 6)))
    assert [one.did for one in runs.cancel()] == ["cancelled"] * 5
    assert (squeue.parent / "questions").read_text().split() == ["squeue", "scancel"]
    squeue.write_text("")
    for run in runs:
        assert isinstance(run.exception(timeout=10), afina.Cancelled)


def test_a_hundred_handles_that_wait_ten_minutes_ask_slurm_some_fifty_times(
    claim: Callable[..., RunDir], squeue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that runs 200 times as fast: pauses of 0.5 s, each 1.3 times the one before, up to 15 s, are 50 in ten minutes."""
    fast = SimpleNamespace(monotonic=lambda: 200 * time.monotonic(), sleep=lambda s: time.sleep(s / 200))
    first = claim("run 1", job="1")
    runs = [afina.Run(first.path)]
    for n in range(2, 101):
        path = Path(shutil.copytree(first.path, tmp_path / f"run {n}"))
        (path / "submissions.jsonl").write_text(f'{{"job_id": "{n}", "via": "sbatch"}}\n')
        runs.append(afina.Run(path))
    squeue.write_text("".join(f"{n}|{n}|RUNNING|1:00|N/A|n1|\n" for n in range(1, 101)))
    monkeypatch.setattr("afina.watch.wait.time", fast)
    late: list[BaseException] = []

    def wait(run: afina.Run) -> None:
        try:
            run.wait(timeout=600)
        except afina.WaitTimeout as error:
            late.append(error)

    threads = [threading.Thread(target=wait, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(late) == 100
    questions = (tmp_path / "questions").read_text().splitlines()
    assert set(questions) == {"squeue"} and 2 <= len(questions) <= 55, len(questions)


def test_a_deleted_run_directory_is_found_by_its_job(
    claim: Callable[..., RunDir], squeue: Path, tmp_path: Path
) -> None:
    """By the batch script that Slurm names; another run's job is left alone."""
    run, other = (afina.Run(claim(name, job=job).path) for name, job in (("run", "7"), ("run 2", "8")))
    squeue.write_text("7|7|PENDING|1:00|N/A||Resources\n8|8|PENDING|1:00|N/A||Resources\n")
    commands = f"7|{run.path}/submitit/7_submission.sh\n8|{other.path}/finetune.sbatch {other.path}\n"
    (tmp_path / "commands").write_text(commands)
    program(
        tmp_path / "bin",
        "squeue",
        f"case $* in *%o*) cat {shlex.quote(str(tmp_path))}/commands ;; *) cat {shlex.quote(str(squeue))} ;; esac\n",
    )
    shutil.rmtree(run.path)
    assert run.state == "PENDING" and "was deleted" in str(run.summary.why)
    cancelled = run.cancel()
    assert (cancelled.did, cancelled.job_ids, run.path.exists()) == ("cancelled", ("7",), False)
    squeue.write_text("")
    (tmp_path / "commands").write_text("")
    assert "its run directory was deleted" in str(run.exception(timeout=30)) and other.path.exists()


def test_as_completed_gives_each_when_it_has_ended(claim: Callable[..., RunDir], squeue: Path) -> None:
    first, second = (afina.Run(claim(name, job=job).path) for name, job in (("a", "1"), ("b", "2")))
    squeue.write_text("1|1|RUNNING|1:00|N/A|n1|\n2|2|RUNNING|1:00|N/A|n1|\n")

    def end(run: afina.Run) -> None:
        run.dir.record(Outcome(outcome="finished", exit_code=0, attempt=f"{run.job_id}.0"))

    threading.Timer(0.3, end, [second]).start()
    threading.Timer(1.2, end, [first]).start()
    assert [run.path for run in afina.as_completed([first, second], timeout=30)] == [second.path, first.path]
