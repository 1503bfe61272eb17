"""Early stopping and pruning: where a training ends, and that it ends there after any number of stops and resumes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.recipe.refusals import BASE, refused
from tests.unit.training.in_process import lines, weights

from afina.errors import RecipeError
from afina.run.directory import PRUNING, RunDir
from afina.run.outcome import Outcome
from afina.worker.survival.early_stop import EarlyStop, MedianStop
from afina.worker.survival.stop import CAUSES

EARLY = (
    "train.evaluate=2",
    "train.save_every=1",
    "train.max_steps=30",
    "train.keep_checkpoints=30",
    "train.learning_rate=0.02",
)


def _losses(trainer: Any) -> list[float]:
    return [line["eval_loss"] for line in lines(trainer) if "eval_loss" in line]


@pytest.mark.parametrize(
    "values, lower, delta, waited, stops",
    [
        ([0.5, 0.6, 0.6, 0.6], False, 0.0, 2, True),  # equal is no improvement
        ([0.5, 0.4, 0.6, 0.5], False, 0.0, 1, False),  # an improvement starts anew
        ([0.5, 0.42, 0.35, 0.33], True, 0.1, 1, False),  # 0.42 is no improvement, 0.35 is: on the best, not on the last
        ([0.5, 0.42, 0.41, 0.28], True, 0.1, 0, True),
        ([math.nan, 0.1, None, 0.2], False, 0.0, 0, False),  # an undefined value is no improvement, nor a best one
        ([None, None, math.nan], False, 0.0, 0, False),  # what was never measured has not ceased to improve
        ([0.1, None, None], False, 0.0, 2, True),
    ],
)
def test_evaluations_without_improvement_are_counted(
    values: list[float | None], lower: bool, delta: float, waited: int, stops: bool
) -> None:
    early = EarlyStop("f1", lower, 2, delta)
    ends = [early.count(value) for value in values]
    assert (early.waited, any(ends)) == (waited, stops)


def test_a_training_ends_where_the_loss_no_longer_improves_however_often_it_is_stopped(
    build: Callable[..., Any],
) -> None:
    early = (*EARLY, "train.early_stopping={patience: 2, metric: loss, min_delta: 0.01}")
    whole = build({}, *early)
    losses = _losses(whole)
    counted = EarlyStop("loss", True, 2, 0.01)
    assert [counted.count(loss) for loss in losses] == [False] * (len(losses) - 1) + [True]
    end = whole.state.global_step
    assert end == 2 * len(losses) < 30 and whole.state.max_steps == 30
    assert [e["why"] for e in whole.attempt.run.lines("events.jsonl") if e["event"] == "stopped_early"] == [
        "no improvement of eval loss by more than 0.01 for 2 evaluations"
    ]
    folder = whole.attempt.run.checkpoints
    assert (folder / f"step-{end}").is_dir()
    for step in (1, 2, end - 3, end - 2, end - 1):
        again = build({}, *early, train=False)
        shutil.copytree(folder / f"step-{step}", again.attempt.run.checkpoints / f"step-{step}")
        shutil.copy(whole.attempt.run.metrics_file, again.attempt.run.metrics_file)
        again.train(resume_from_checkpoint=str(again.attempt.run.checkpoints / f"step-{step}"))
        again.attempt.saver.finish()
        assert again.state.global_step == end and lines(again) == lines(whole), f"resumed from step {step}"
        assert bool((weights(again) == weights(whole)).all())
        assert again.attempt.early_stop == whole.attempt.early_stop and whole.attempt.early_stop.stopped


def test_a_metric_that_is_never_defined_ends_nothing_and_is_told(
    build: Callable[..., Any], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from afina.worker.training.results.export_results import export_results

    (project / "never.py").write_text("def ours(labels, predictions):\n    return None\n")
    early = ("metrics=[accuracy,never:ours]", "train.early_stopping={patience: 1, metric: 'never:ours'}")
    trainer = build({}, *EARLY, *early, "train.max_steps=6")
    assert trainer.state.global_step == 6 and trainer.attempt.ended_early is None
    told = "WARNING: train.early_stopping: eval_ours has had no value so far, so it ends nothing"
    assert capsys.readouterr().out.count(told) == 3
    assert "eval_ours was never defined: train.early_stopping could not end the training" in (
        export_results(trainer).warnings
    )


def test_a_stop_before_the_last_evaluation_leaves_it_to_the_next_attempt(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from afina.worker.training.evaluation import StoppedEarly

    early = (*EARLY, "train.early_stopping={patience: 1, metric: loss, min_delta: 10}")
    stopped = build({}, *early, train=False)
    at_the_end = lambda lead_s: CAUSES.index("asked") if stopped.state.global_step == 4 else 0  # noqa: E731
    monkeypatch.setattr(stopped.attempt.stop, "check", at_the_end)
    stopped.train()
    stopped.attempt.saver.finish()
    assert stopped.state.global_step == 4 and stopped.attempt.early_stop.waited == 0
    again = build({}, *early, train=False)
    shutil.copytree(stopped.attempt.run.checkpoints / "step-4", again.attempt.run.checkpoints / "step-4")
    shutil.copy(stopped.attempt.run.metrics_file, again.attempt.run.metrics_file)
    with pytest.raises(StoppedEarly):
        again.train(resume_from_checkpoint=str(again.attempt.run.checkpoints / "step-4"))
    assert again.state.global_step == 4 and again.attempt.early_stop.stopped and len(_losses(again)) == 2


def _trial(path: Path, values: list[float | None], outcome: str | None = "finished", *, pruned: bool = False) -> RunDir:
    """A run with these values of eval_loss, one at the end of each epoch."""
    run = RunDir(path)
    run.attempts.mkdir(parents=True)
    (path / "plan.json").write_text("{}")
    logged = [{"step": 4 * n, "epoch": float(n), "eval_loss": value} for n, value in enumerate(values, start=1)]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in logged))
    if outcome is not None:
        kind: Any = outcome
        run.record(Outcome(outcome=kind, exit_code=0, attempt="1.0", pruned=pruned))
    return run


@pytest.mark.parametrize(
    "own, lower, pruned",
    [
        ([0.5, 0.45], False, True),  # the others have 0.1 … 0.5, and 0.6 in their second epoch
        ([0.5, 0.61], False, False),
        ([0.5, 0.6], False, False),  # as good as the median
        ([0.7, 0.2], False, False),  # its best one counts
        ([0.29], False, True),  # by their first epoch: 0.3 in the median
        ([0.3], False, False),
        ([0.31], True, True),
        ([0.29], True, False),
        ([None, 0.01], False, True),
        ([None], False, False),
    ],
)
def test_a_trial_is_pruned_below_the_median_of_the_finished_ones(
    tmp_path: Path, own: list[float | None], lower: bool, pruned: bool
) -> None:
    for n in range(5):
        _trial(tmp_path / f"trial-{n}", [(n + 1) / 10, 0.6, 0.9])
    mine = _trial(tmp_path / "mine", own, None)
    _trial(tmp_path / "pruned", [0.99], pruned=True)
    _trial(tmp_path / "failed", [0.99], "failed")
    _trial(tmp_path / "running", [0.99], None)
    why = MedianStop("eval_loss", lower).judge(mine, float(len(own)))
    assert (why is not None) == pruned and (why is None or "the median of 5 finished trials was" in why)
    shutil.rmtree(tmp_path / "trial-2")
    assert MedianStop("eval_loss", lower).judge(mine, float(len(own))) is None, "four are too few to compare with"


def test_a_pruned_training_ends_at_the_same_step_however_often_it_is_stopped(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    def trial(**options: Any) -> Any:
        trainer = build({}, *EARLY, train=False)
        (trainer.attempt.run.path / PRUNING).write_text('{"metric": "eval_loss", "lower": true}')
        return trainer

    for n in range(5):
        _trial(tmp_path / f"other {n}", [100.0, 100.0, -1.0])  # epochs 1, 2 and 3
    whole = trial()
    whole.train()
    whole.attempt.saver.finish()
    end, why = whole.state.global_step, whole.attempt.ended_early
    assert 0 < end < 30 and whole.attempt.median_stop.reason == why and "the median of 5 finished trials was -1" in why
    assert [line["epoch"] for line in lines(whole) if "eval_loss" in line][-1] >= 3
    for step in (2, end - 1, end):
        again = trial()
        shutil.copytree(whole.attempt.run.checkpoints / f"step-{step}", again.attempt.run.checkpoints / f"step-{step}")
        shutil.copy(whole.attempt.run.metrics_file, again.attempt.run.metrics_file)
        checkpoint = again.attempt.run.checkpoints / f"step-{step}"
        if step == end:
            again.restore(checkpoint)
        else:
            again.train(resume_from_checkpoint=str(checkpoint))
            again.attempt.saver.finish()
        assert (again.state.global_step, again.attempt.ended_early) == (end, why)
        assert bool((weights(again) == weights(whole)).all())


def test_a_trial_that_ends_by_itself_is_not_pruned_at_the_same_step(build: Callable[..., Any], tmp_path: Path) -> None:
    for n in range(5):
        _trial(tmp_path / f"other {n}", [-1.0])  # epoch 1; step 10 is the first evaluation behind it
    trainer = build({}, *EARLY, "train.early_stopping={patience: 4, min_delta: 1000}", train=False)
    (trainer.attempt.run.path / PRUNING).write_text('{"metric": "eval_loss", "lower": true}')
    trainer.train()
    trainer.attempt.saver.finish()
    assert trainer.state.global_step == 10
    assert trainer.attempt.early_stop.stopped and trainer.attempt.median_stop.reason is None


def test_a_patience_that_ends_nothing_is_refused_before_the_queue(build: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match="a patience of 2 ends no training of 3 evaluations before its end") as error:
        build({}, "train.max_steps=6", "train.evaluate=2", "train.early_stopping={}", "data.weight=weight", train=False)
    assert "evaluate more often" in error.value.remedy


def test_a_metric_of_early_stopping_is_checked_as_any_other() -> None:
    key = "train.early_stopping.metric"
    assert "`acuracy` is not a metric; did you mean `accuracy`?" in str(refused(BASE, f"{key}=acuracy"))
    assert "is a table" in str(refused(BASE, f"{key}=confusion_matrix"))
    assert "must be 1 or more" in str(refused(BASE, "train.early_stopping.patience=0"))


def test_an_early_end_is_told_with_its_steps() -> None:
    about: dict[str, Any] = {
        "outcome": "finished",
        "exit_code": 0,
        "attempt": "local-1",
        "global_step": 40,
        "max_steps": 1000,
    }
    why = "no improvement of eval accuracy for 2 evaluations"
    assert Outcome(**about, early_stop=why).ended_early == f" of 1,000 (stopped early: {why})"
    assert Outcome(**about).ended_early == ""
