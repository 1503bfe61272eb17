"""`afina status`, `list` and `watch`."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.unit.conftest import Ran
from tests.unit.watch.conftest import Slurm, begin, end, make, metric

from afina.run.outcome import Outcome
from afina.watch.overview import RunSummary


def test_status_of_one_is_an_object_and_of_many_a_list(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    make(runs / "a")
    one = json.loads(command("status", runs / "a", "--json").stdout)
    assert {"run", "state", "step", "job_id", "metrics", "error"} <= set(one) and one["metrics"] == {}
    assert json.loads(command("status", "a", "--json").stdout)["run"] == str(runs / "a")
    assert [r["run"] for r in json.loads(command("status", runs, "--json").stdout)] == [str(runs / "a")]
    assert set(one) == set(RunSummary.__dataclass_fields__)


def test_warnings_stand_below_the_metrics(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    run = make(runs / "a")
    begin(run, "local-1")
    shared = "3 of 9 rows of eval are in train too"
    metrics = {"eval_accuracy": 0.9}
    run.record(Outcome(outcome="finished", exit_code=0, attempt="local-1", metrics=metrics, warnings=[shared]))
    shown = command("status", "a").stdout
    assert shown.index("eval_accuracy 0.900000") < shown.index(f"warning: {shared}")
    assert json.loads(command("status", "a", "--json").stdout)["warnings"] == [shared]
    # An older afina's outcome has none; its data warnings are in prepared.json.
    outcome = json.loads(run.outcome_file.read_text())
    del outcome["warnings"]
    run.outcome_file.write_text(json.dumps(outcome))
    (run.path / "prepared.json").write_text(json.dumps({"warnings": [f"{shared}, word for word: b.csv, row 1"]}))
    assert f"warning: {shared}, word for word" in command("status", "a").stdout


def test_status_without_runs_says_how_to_make_one(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    done = command("status")
    assert done.returncode == 0 and done.stdout.startswith("no runs yet: `afina submit RECIPE`")
    assert json.loads(command("status", "--json").stdout) == []
    assert command("list").stdout == "no runs yet\n"
    done = command("status", env={"AFINA_SCRATCH": None})
    assert done.returncode == 3 and "AFINA_SCRATCH is not set" in done.stderr


def test_status_is_a_table_with_totals(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    slurm.answer("squeue", "2|2|PENDING|30:00|N/A||Resources")
    begin(done_ := make(runs / "done"), "local-1")
    end(done_, "local-1", "finished", "", "")
    make(runs / "waits", job="2")
    said = command("status").stdout.splitlines()
    assert said[0].split()[:3] == ["state", "run", "step"]
    assert said[1].startswith("FINISHED  done") and said[2].startswith("PENDING   waits")
    assert said[2].endswith("it is next, and the nodes or GPUs it asks for are busy (Resources)"), "not cut in a pipe"
    assert said[3] == "2 runs: 1 finished, 1 pending"


def test_list_filters_and_sorts(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    for number, (name, value) in enumerate([("b", 0.5), ("a", 0.75), ("c", None)]):
        run = make(runs / name)
        os.utime(run.plan_file, (time.time() - 3600 * (number + 1),) * 2)
        if value is not None:
            begin(run, "local-1")
            metric(run, step=3, eval_loss=1.0, eval_accuracy=value)
            end(run, "local-1", "stopped", "asked", "")

    def names(*options: str) -> list[str]:
        return [line.split()[-1] for line in command("list", *options).stdout.splitlines()[1:]]

    assert (names(), names("--sort", "name"), names("--sort", "best")) == (
        ["b", "a", "c"],
        ["a", "b", "c"],
        ["a", "b", "c"],
    )
    assert (names("--state", "stopped"), names("--state", "PLANNED")) == (["b", "a"], ["c"])
    assert command("list", "--state", "failed").stdout == "no runs that are failed\n"
    sized = command("list", "--size").stdout.splitlines()
    assert sized[0].split() == ["state", "accuracy", "age", "size", "run"] and re.search(r"\d k?B  b$", sized[1])
    as_json = json.loads(command("list", "--json", "--size").stdout)
    on_disk = sum(f.stat().st_size for f in (runs / "b").rglob("*") if f.is_file())
    assert as_json[0]["size_bytes"] == on_disk


def test_list_sorts_by_a_metric_of_ones_own_in_its_direction(
    slurm: Slurm, runs: Path, command: Callable[..., Ran]
) -> None:
    for name, value in (("dear", 9.0), ("cheap", 2.0)):
        begin(run := make(runs / name, best_metric="costs:total:lower"), "local-1")
        metric(run, step=3, eval_loss=1.0, eval_total=value)
        end(run, "local-1", "stopped", "asked", "")
    lines = command("list", "--sort", "best").stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["cheap", "dear"] and "2.0000" in lines[1]


def test_watch_needs_a_terminal(slurm: Slurm, runs: Path, command: Callable[..., Ran]) -> None:
    make(runs / "a")
    done = command("status", "--watch")
    assert done.returncode == 2 and "--watch draws on a terminal" in done.stderr
    assert json.loads(command("status", "a", "--watch", "--json").stdout)["state"] == "PLANNED"


def test_watch_redraws_until_ctrl_c_which_is_silent(slurm: Slurm, runs: Path) -> None:
    """On a terminal of its own, as somebody watches."""
    import pty
    import signal

    slurm.answer("squeue", "2|2|RUNNING|30:00|N/A|n1|None")
    begin(make(runs / "runs", job="2"), "2.0")
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover
        os.execv(sys.executable, [sys.executable, "-m", "afina", "status", "--watch"])
    said = b""
    while b"1 running" not in said:
        said += os.read(terminal, 4096)
    time.sleep(0.2)
    os.kill(child, signal.SIGINT)
    try:
        while more := os.read(terminal, 4096):
            said += more
    except OSError:  # the other end has gone
        pass
    _, code = os.waitpid(child, 0)
    os.close(terminal)
    assert code == 0 and b"RUNNING" in said and b"\x1b[32m" in said, said
    assert b"interrupted" not in said and b"Traceback" not in said, said
