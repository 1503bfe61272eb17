"""What comes after an attempt: the table of `afina.run.requeue`, from real run directories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from afina.errors import ClaimedError, EnvironmentProblem, TrainingError
from afina.recipe.schema import Recipe
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.outcome import Outcome
from afina.run.plan import make_plan
from afina.run.requeue import decide, finish_attempt
from afina.site.settings import Site


@pytest.fixture
def run(recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site, tmp_path: Path) -> RunDir:
    plan = make_plan(recipe(), site, recipe_file=recipe_file())
    return claim(plan, {}, ["false"], "", tmp_path / "a run")


def attempt(run: RunDir, name: str, began: int | None, committed: int) -> None:
    """What the worker leaves: it began to train at a step, and checkpoints up to another one are there."""
    run.begin_attempt(name)
    if began is not None:
        run.event("training", attempt=name, step=began, max_steps=100)
    folder = run.checkpoints / f"step-{committed}"
    if committed and not folder.exists():
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")


def ended(name: str, kind: Any, **fields: Any) -> Outcome:
    code = {"finished": 0, "stopped": 75, "failed": 4}[kind]
    return Outcome(outcome=kind, attempt=name, **{"exit_code": code, **fields})


@pytest.mark.parametrize(
    ("outcome", "began", "committed", "action"),
    [
        (ended("1.0", "finished"), 0, 100, "end"),
        (ended("1.0", "stopped", cause="asked"), 0, 10, "end"),
        (ended("1.0", "stopped", cause="limit"), 0, 10, "requeue"),
        (ended("1.0", "stopped", cause="limit"), 10, 10, "end"),
        (ended("1.0", "stopped", cause="signal"), 10, 10, "requeue"),
        (ended("1.0", "failed", cause="killed", error="killed"), 0, 10, "requeue"),
        (ended("1.0", "failed", cause="killed", error="killed"), 10, 10, "requeue"),
        (ended("1.0", "failed", cause="killed", error="killed"), None, 0, "requeue"),
        (ended("1.0", "failed", cause="stall", error="no progress"), 0, 0, "requeue"),
        (ended("1.0", "failed", cause="loss", error="not finite"), 0, 10, "end"),
        (ended("1.0", "failed", cause="disk", error="full", exit_code=3), 0, 10, "end"),
        (ended("1.0", "failed", cause="claimed", error="running", exit_code=2), None, 0, "end"),
        (ended("1.0", "failed", error="no such file", exit_code=3), None, 0, "end"),
    ],
)
def test_the_table(run: RunDir, outcome: Outcome, began: int | None, committed: int, action: str) -> None:
    attempt(run, "1.0", began, committed)
    assert decide(run, outcome).action == action


def test_a_broken_node_is_left_out(run: RunDir) -> None:
    attempt(run, "1.0", None, 0)
    broken = EnvironmentProblem("there is an NVIDIA driver, and torch …", cause="node", nodes=("n2",)).failure
    assert decide(run, ended("1.0", "failed", exit_code=3, failure=broken)).exclude == ("n2",)
    run.report_failure("1.0", "node1", replace(broken, nodes=("n2", "n3")))
    finish_attempt(run, "1.0", 1)
    assert (run.attempts / "1.0/next").read_text().splitlines()[:2] == ["requeue", "n2,n3"]


def _bad_node(run: RunDir, number: int, node: str, message: str) -> list[str]:
    name = f"{number}.0"
    attempt(run, name, None, 0)
    problem = EnvironmentProblem(message.replace("NODE", node), cause="node", nodes=(node,))
    run.report_failure(name, "node0", problem.failure)
    finish_attempt(run, name, 3)
    return (run.attempts / name / "next").read_text().splitlines()


def test_bad_nodes_are_collected_with_a_growing_pause(run: RunDir) -> None:
    answers = [_bad_node(run, n, f"n{n}", "NODE: broken in its own way " + "abcdef"[n]) for n in range(1, 6)]
    assert [(lines[0], lines[1], lines[3]) for lines in answers] == [
        ("requeue", "n1", "0"),
        ("requeue", "n1,n2", "60"),
        ("requeue", "n1,n2,n3", "300"),
        ("requeue", "n1,n2,n3,n4", "900"),
        ("requeue", "n1,n2,n3,n4,n5", "1800"),
    ]
    assert _bad_node(run, 6, "n6", "NODE: again")[0] == "end", "a budget for node failures"


def test_what_fails_in_the_same_way_on_every_node_is_not_the_node(run: RunDir) -> None:
    answers = [_bad_node(run, n, f"rack-{name}", "NODE: no driver") for n, name in enumerate("abcd")]
    assert [lines[0] for lines in answers] == ["requeue", "requeue", "requeue", "end"]
    assert "it is not the nodes" in answers[-1][2] and "rack-a, rack-b, rack-c, rack-d" in answers[-1][2]


def test_another_end_in_between_begins_the_count_anew_and_keeps_the_nodes_out(run: RunDir) -> None:
    _bad_node(run, 1, "n1", "NODE: no driver")
    attempt(run, "2.0", 0, 10)
    run.record(ended("2.0", "stopped", cause="signal"))
    finish_attempt(run, "2.0", 75)
    assert _bad_node(run, 3, "n2", "NODE: no driver")[1:4:2] == ["n1,n2", "0"]


@pytest.mark.parametrize(
    ("code", "log", "cause", "message", "remedy"),
    [
        (137, "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.", "host-memory", "memory (4 GB per node)", "to 6"),
        (1, "srun: error: n1: task 0: Out Of Memory", "host-memory", "memory (4 GB per node)", "sbatch --mem=6G "),
        (1, "cgroup: oom_kill 2", "host-memory", "memory (4 GB per node)", "resources.mem_gb"),
        (128 + 24, "", "ulimit", "processor time", "ulimit"),
        (1, "  exitcode  : -24 (pid: 5)", "ulimit", "ulimit -t", "ulimit"),
        (128 + 25, "", "ulimit", "ulimit -f", "ulimit"),
        (137, "", "killed", "signal 9 (SIGKILL)", "afina submit"),
    ],
)  # fmt: skip
def test_memory_and_limits_are_named_and_not_tried_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, code: int, log: str, cause: str, message: str, remedy: str
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    attempt(run, "1.0", 0, 10)
    (run.attempts / "1.0/node0.json").write_text("{}")
    (run.attempts / "1.0/srun.log").write_text(f"{log}\n")
    outcome = finish_attempt(run, "1.0", code)
    assert outcome.cause == cause and outcome.failure is not None
    assert message in outcome.failure.message and remedy in outcome.failure.remedy
    assert (run.attempts / "1.0/next").read_text().startswith("requeue" if cause == "killed" else "end")
    assert outcome.exit_code == (4 if cause == "killed" else 3)


def test_a_step_that_started_nothing_is_not_the_users_input(run: RunDir) -> None:
    """srun itself ends with 2 where the step has no PATH."""
    attempt(run, "1.0", None, 0)
    outcome = finish_attempt(run, "1.0", 2)
    assert (outcome.exit_code, outcome.cause) == (3, "start") and "the worker never started" in (outcome.error or "")


def test_a_node_on_which_nothing_began_is_left_out(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(run, "1.0", None, 0)
    monkeypatch.setenv("AFINA_NODES", "n1 n2 ")
    (run.attempts / "1.0/node0.json").write_text("{}")
    outcome = finish_attempt(run, "1.0", 255)
    assert (outcome.cause, outcome.exit_code) == ("node", 3)
    assert (run.attempts / "1.0/next").read_text().splitlines()[:2] == ["requeue", "n2"]


@pytest.mark.parametrize(
    ("log", "cause", "nodes"),
    [
        ("srun: error: n2: task 1: Exited with exit code 255\nsrun: error: n1: task 0: Terminated", "node", ("n2",)),
        (
            "srun: error: Task launch for StepId=7.0 failed on node n2: Communication connection failure",
            "node",
            ("n2",),
        ),
        ("srun: error: Node failure on n1", "node", ("n1",)),
        ("srun: error: n[1-2]: tasks 0-1: Exited with exit code 255", "start", ()),
        ("srun: error: Unable to create step for job 7: Invalid Trackable RESource (TRES) specification", "start", ()),
        ("", "start", ()),
    ],
)
def test_where_no_worker_began_sruns_words_tell_whose_fault_it_is(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, log: str, cause: str, nodes: tuple[str, ...]
) -> None:
    attempt(run, "1.0", None, 0)
    monkeypatch.setenv("AFINA_NODES", "n1 n2 ")
    (run.attempts / "1.0/srun.log").write_text(f"{log}\n")
    outcome = finish_attempt(run, "1.0", 1)
    assert outcome.failure is not None and (outcome.cause, outcome.failure.nodes) == (cause, nodes)
    assert log.partition("\n")[0] in outcome.failure.message


def test_the_same_failure_twice_without_a_step_is_the_end(run: RunDir) -> None:
    """Another failure, or a step in between, begins the count anew."""

    def fails(name: str, began: int, committed: int, error: str) -> str:
        attempt(run, name, began, committed)
        run.report_failure(name, "rank0", TrainingError(error, cause="RuntimeError").failure)
        finish_attempt(run, name, 4)
        action, _, why, pause = (run.attempts / name / "next").read_text().splitlines()
        assert why and pause == "0"
        return action

    assert fails("1.0", 0, 0, "RuntimeError: at address 0x12") == "requeue"
    assert fails("1.1", 0, 0, "RuntimeError: another") == "requeue"
    assert fails("1.2", 0, 20, "RuntimeError: another") == "requeue"
    assert fails("1.3", 20, 20, "RuntimeError: another at 7") == "requeue"
    assert fails("1.4", 20, 20, "RuntimeError: another at 8") == "end"
    assert run.outcome() is not None


def test_a_preempted_run_goes_on_without_end(run: RunDir) -> None:
    for number in range(30):
        attempt(run, f"1.{number}", 10, 10)
        run.record(ended(f"1.{number}", "stopped", cause="signal"))
        finish_attempt(run, f"1.{number}", 75)
        assert (run.attempts / f"1.{number}/next").read_text().startswith("requeue\n")


def test_an_attempt_that_found_another_at_work_leaves_its_outcome_alone(run: RunDir) -> None:
    run.record(ended("1.0", "finished"))
    run.begin_attempt("2.0")
    run.report_failure("2.0", "rank0", ClaimedError("attempt 1.0 is running", cause="claimed").failure)
    outcome = finish_attempt(run, "2.0", 2)
    assert (outcome.outcome, outcome.exit_code) == ("failed", 2)
    left = run.outcome()
    assert left is not None and (left.outcome, left.attempt) == ("finished", "1.0")
    assert (run.attempts / "2.0/next").read_text().startswith("end\n")
