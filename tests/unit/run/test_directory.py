"""A run directory: what is appended to it, its attempts and their outcomes."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.unit.run.claimed import claimed, mode

from afina.errors import Failure, InputError
from afina.run.causes import ensure_outcome
from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.run.plan import Plan

# -- writing -----------------------------------------------------------------------------------------------------------


def test_append_and_lines(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    run.append("submissions.jsonl", {"job_id": "7", "name": "a\nb ☃"})
    run.event("began", node=0)
    (first,) = run.lines("submissions.jsonl")
    assert (first["job_id"], first["name"]) == ("7", "a\nb ☃") and first["time"] > 1.6e9
    assert [e["event"] for e in run.lines("events.jsonl")] == ["began"]
    assert list(run.lines("absent.jsonl")) == []
    assert mode(run.path / "events.jsonl") == 0o600


def test_a_torn_last_line_is_left_out_and_does_not_take_the_next_with_it(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    whole = json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + "\n"
    for cut in (5, 2, 9):
        run.metrics_file.write_text(whole[:-cut])
        assert run.metrics() == [{"step": 1}]
    run.metrics_file.write_bytes(whole.encode() + b'{"text": "\xe2\x98')
    assert run.metrics() == [{"step": 1}, {"step": 2}]
    run.append("metrics.jsonl", {"step": 3})
    assert [m["step"] for m in run.metrics()] == [1, 2, 3]


def test_concurrent_appends_are_all_there(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    threads = [
        threading.Thread(target=lambda k=k: [run.event("e", k=k, i=i, pad="x" * 500) for i in range(50)])  # type: ignore[misc]
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((e["k"], e["i"]) for e in run.lines("events.jsonl")) == [(k, i) for k in range(4) for i in range(50)]


# -- attempts and outcomes ---------------------------------------------------------------------------------------------


def outcome(**changes: Any) -> Outcome:
    return Outcome.model_validate({"outcome": "finished", "exit_code": 0, "attempt": "local-1", **changes})


def test_attempts_are_numbered_or_named(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    assert [run.begin_attempt().name for _ in range(2)] == ["local-1", "local-2"]
    assert run.begin_attempt("77.0") == run.begin_attempt("77.0") == run.attempts / "77.0"
    assert sorted(run.attempt_names()) == ["77.0", "local-1", "local-2"]
    assert mode(run.attempts / "77.0") == 0o700


def test_an_outcome_is_recorded_with_its_exit_code_for_a_shell(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    folder = run.begin_attempt()
    written = outcome(metrics={"eval_accuracy": 0.5, "eval_confusion_matrix": [[1, 2], [3, 4]]}, labels=["a, b", "☃"])
    run.record(written)
    assert run.outcome() == written and (folder / "exit").read_text() == "0\n"
    run.record(outcome(outcome="stopped", exit_code=75, attempt="not there"))
    assert run.outcome() is not None and (folder / "exit").read_text() == "0\n"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"outcome": "weird"}'])
def test_an_outcome_that_cannot_be_read_is_none(plan: Plan, tmp_path: Path, text: str) -> None:
    run = claimed(plan, tmp_path / "r")
    run.outcome_file.write_text(text)
    assert run.outcome() is None


def test_an_outcome_of_a_later_version_is_read(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    run.outcome_file.write_text(json.dumps({**outcome().model_dump(), "new": 1}))
    assert run.outcome() == outcome()


def test_a_failure_does_not_overwrite_what_the_attempt_said(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    run.begin_attempt("local-1")
    run.record(outcome(global_step=7))
    assert run.record_failure("local-1", Failure("TrainingError", "killed")).outcome == "finished"
    assert run.record_failure("local-2", Failure("TrainingError", "a later attempt")).outcome == "finished"
    run.record(outcome(outcome="stopped", exit_code=75))
    failed = run.record_failure("local-2", Failure("TrainingError", "it broke", "mend it"))
    assert (failed.outcome, failed.exit_code, failed.error) == ("failed", 4, "it broke\n  remedy: mend it")
    assert run.outcome() == failed


@pytest.mark.parametrize(
    ("code", "says", "recorded"),
    [(-9, "signal 9", 4), (137, "signal 9", 4), (1, "exit code 1", 4), (3, "exit code 3", 3), (2, "exit code 2", 3)],
)
def test_an_attempt_that_recorded_nothing_gets_an_outcome(
    plan: Plan, tmp_path: Path, code: int, says: str, recorded: int
) -> None:
    run = claimed(plan, tmp_path / "it's")
    folder = run.begin_attempt("9.0")
    (folder / "node0.log").write_bytes(b"first\n" * 100 + b"Killed \xff here\n")
    ended = ensure_outcome(run, "9.0", code)
    assert (ended.outcome, ended.exit_code) == ("failed", recorded)
    assert says in (ended.error or "") and "| Killed" in (ended.error or "") and "remedy: " in (ended.error or "")
    assert (folder / "exit").read_text() == f"{recorded}\n"


def test_the_failure_that_a_rank_reported_becomes_the_outcome(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    folder = run.begin_attempt("9.0")
    (folder / "failed.rank0.json").write_text('{"error": "cut o')
    reported = Failure("TrainingError", "loss is NaN", "lower the rate", "loss")
    run.report_failure("9.0", "rank1", reported)
    run.report_failure("9.0", "rank2", Failure("TrainingError", "a later one"))
    assert ensure_outcome(run, "9.0", 1).failure == reported


def test_a_run_goes_on_where_it_was_begun(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "a run")
    run.check_place()
    copy = RunDir(shutil.copytree(run.path, tmp_path / "copy"))
    with pytest.raises(InputError, match=r"is a copy of .*, and would write there"):
        copy.check_place()
    moved = RunDir(run.path.rename(tmp_path / "moved"))
    with pytest.raises(InputError, match="has been moved") as caught:
        moved.check_place()
    run.path.symlink_to(moved.path)
    moved.check_place()
    assert caught.value.remedy.endswith(f"ln -s {moved.path} '{run.path}'")
