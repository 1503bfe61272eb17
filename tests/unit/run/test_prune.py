"""Checkpoints of a finished run that go and stay, and runs whose checkpoints are gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from afina.cli.watch_commands import prune as command
from afina.errors import InputError
from afina.run.directory import RunDir
from afina.run.new_run import check_free
from afina.run.outcome import Outcome
from afina.run.prune import prune


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RunDir]:
    def make(name: str = "a run", outcome: str = "finished", **fields: Any) -> RunDir:
        directory = RunDir(tmp_path / name)
        for folder in (
            "attempts/1.0",
            "model",
            *(f"checkpoints/{n}" for n in ("step-10", "step-20", "step-10.damaged-1")),
        ):
            (directory.path / folder).mkdir(parents=True)
        for folder in directory.checkpoints.iterdir():
            (folder / "model.safetensors").write_bytes(bytes(1000))
        (directory.model / "model.safetensors").write_bytes(bytes(10))
        directory.plan_file.write_text("{}")
        fields = {"global_step": 20, "model_step": 10, **fields}
        directory.record(Outcome(outcome=outcome, exit_code=0, attempt="1.0", **fields))  # type: ignore[arg-type]
        return directory

    return make


def _left(directory: RunDir) -> list[str]:
    return sorted(path.name for path in directory.checkpoints.iterdir())


@pytest.mark.parametrize(
    ("keep", "left"), [("best", ["step-10"]), ("none", []), ("all", ["step-10", "step-10.damaged-1", "step-20"])]
)
def test_the_checkpoints_that_stay(run: Callable[..., RunDir], keep: Any, left: list[str]) -> None:
    directory = run()
    shown = prune(directory, keep, dry_run=True)
    assert (
        len(_left(directory)) == 3
        and sorted(shown.kept) == left
        and sum(shown.removed.values()) == 1000 * (3 - len(left))
    )
    assert prune(directory, keep) == shown
    assert _left(directory) == left and (directory.model / "model.safetensors").exists()


def test_runs_that_need_their_checkpoints_are_left_alone(run: Callable[..., RunDir]) -> None:
    for directory, message in (
        (run("stopped", "stopped"), "has not finished"),
        (run("failed", "failed"), "has not finished"),
        (run("no model"), "`model/` has no weights"),
    ):
        if message.startswith("`model/`"):
            (directory.model / "model.safetensors").unlink()
        with pytest.raises(InputError, match=message):
            prune(directory, "none")
        assert len(_left(directory)) == 3


def test_the_command_says_what_goes_and_what_stays(run: Callable[..., RunDir]) -> None:
    one, two = run("one"), run("two", "stopped")
    paths = [str(one.path), str(two.path)]
    shown = CliRunner().invoke(command, [*paths, "--dry-run"]).output
    assert "would remove step-10.damaged-1, step-20 (2" in shown and "stays: model/, step-10" in shown
    assert "two: left alone: has not finished" in shown and len(_left(one)) == 3
    done = CliRunner().invoke(command, [*paths, "--keep", "none"])
    assert done.exit_code == 0 and _left(one) == [] and len(_left(two)) == 3
    refused = CliRunner().invoke(command, [str(two.path)])
    assert isinstance(refused.exception, InputError)


def test_a_run_whose_checkpoints_are_gone_is_refused(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "it's a run")
    directory.attempts.mkdir(parents=True)
    directory.check_progress()
    directory.event("training", attempt="1.0", step=0)
    directory.metrics_file.write_text('{"step": 3, "loss": 1.0}\n')
    directory.check_progress()  # killed before its first save
    directory.event("checkpoint", attempt="1.0", step=10)
    with pytest.raises(InputError, match="has made 10 steps, and there is no checkpoint") as caught:
        directory.check_progress()
    assert "afina rerun '" in caught.value.remedy
    (directory.checkpoints / "step-10.damaged-1").mkdir(parents=True)
    with pytest.raises(InputError, match="10 steps"):
        directory.check_progress()
    (directory.checkpoints / "step-10").mkdir()
    directory.check_progress()


@pytest.mark.parametrize("record", ["outcome", "metrics"])
def test_progress_that_one_record_alone_shows_counts(tmp_path: Path, record: str) -> None:
    directory = RunDir(tmp_path)
    directory.attempts.mkdir()
    if record == "outcome":
        directory.record(Outcome(outcome="stopped", exit_code=75, attempt="1.0", global_step=7))
    else:
        directory.metrics_file.write_text(json.dumps({"step": 7, "loss": 1.0}) + "\n")
    with pytest.raises(InputError, match="has made 7 steps"):
        directory.check_progress()


def test_a_finished_run_says_how_to_train_further(run: Callable[..., RunDir]) -> None:
    directory = run("done")
    with pytest.raises(InputError, match="this run has finished") as caught:
        check_free(directory.path)
    assert f"model={directory.model}" in caught.value.remedy
