"""The table of a sweep: means, intervals and tests over seeds, its best point, its warnings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.statistics.test_scores import write
from tests.unit.sweeps.conftest import GRID, ask, end, queue

from afina.errors import InputError
from afina.run.outcome import Outcome
from afina.sweeps.sweep import Sweep

ACCURACIES = {
    "5e-3": [0.61, 0.63, 0.62, 0.66, 0.58],
    "1e-3": [0.60, 0.61, 0.61, 0.63, 0.57],
    "1e-4": [0.2, 0.25, 0.3, 0.2, 0.21],
}


def test_the_table(sweep: Callable[..., Sweep], bin: Path) -> None:
    """Means, intervals and Holm's p against scipy; a point in the queue is shown and does not win."""
    from scipy import stats

    made = sweep(f"train.learning_rate={','.join(ACCURACIES)},9e-9", seeds=5)
    for number, run in enumerate(made.runs[:15]):
        end(run.dir, "finished", [v for values in ACCURACIES.values() for v in values][number])
    end(made.runs[15].dir, "finished", 0.99)  # one lucky seed of five
    queue(bin, "100_16 RUNNING", "100_17 PENDING")
    table = made.table()
    assert (table.metric, table.direction) == ("eval_accuracy", "maximize")
    assert [row.point for row in table.rows] == [f"learning_rate={v}" for v in ("5e-3", "9e-9", "1e-3", "1e-4")]
    assert table.best is not None and table.best.point == "learning_rate=5e-3" == made.best().point
    raw = [stats.ttest_rel(ACCURACIES[v], ACCURACIES["5e-3"]) for v in ("1e-3", "1e-4")]
    rows = {row.point.removeprefix("learning_rate="): row for row in table.rows}
    for value, test in zip(("1e-3", "1e-4"), raw, strict=True):
        values, row = ACCURACIES[value], rows[value]
        assert row.interval is not None and row.against_best is not None
        low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
        assert (row.interval.low, row.interval.high) == (pytest.approx(low), pytest.approx(high))
        assert row.against_best.p == pytest.approx(test.pvalue)
    small, large = sorted(test.pvalue for test in raw)
    assert sorted(row.p for row in table.rows if row.p is not None) == [
        pytest.approx(2 * small),
        pytest.approx(max(2 * small, large)),
    ]
    assert rows["9e-9"].states == {"FAILED": 2, "FINISHED": 1, "PENDING": 1, "RUNNING": 1} and rows["9e-9"].p is None
    text = str(table)
    assert "learning_rate=5e-3  0.6200  [0.5838, 0.6562]  5/5    best" in text
    assert "2 failed, 1 pending, 1 running" in text
    # The next is the next that can be tested; nothing is claimed about the lucky seed.
    assert (
        "Best: learning_rate=5e-3. It is distinguishable from the next (learning_rate=1e-3): paired over 5 seeds"
        in text
    )
    assert "after correction for 2 comparisons" in text
    assert "Not tested, too few finished runs: learning_rate=9e-9 (1 of 5)." in text
    assert "Holm-corrected" in text and "selected by the same numbers" in text
    as_json = json.loads(json.dumps(table.to_dict()))
    assert as_json["best"] == "learning_rate=5e-3" and as_json["rows"][0]["values"]["3"] == 0.62
    with pytest.raises(InputError, match="did you mean `accuracy`"):
        made.table("acuracy")


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ([0.60, 0.61, 0.61, 0.63, 0.57], "It is distinguishable from the next (learning_rate=1e-3): paired over 5 seeds, p = 0.0"),
        ([0.64, 0.60, 0.63, 0.62, 0.59], "It is NOT distinguishable from the next (learning_rate=1e-3): paired over 5 seeds, p = 0."),
    ],
)  # fmt: skip
def test_the_table_says_whether_the_best_is_better(sweep: Callable[..., Sweep], second: list[float], says: str) -> None:
    made = sweep(GRID, seeds=5)
    for run, value in zip(made.runs, [*ACCURACIES["5e-3"], *second], strict=True):
        end(run.dir, "finished", value)
    assert says in str(made.table())


def test_equals_of_the_best_are_called_so(sweep: Callable[..., Sweep]) -> None:
    made = sweep("train.learning_rate=5e-3,2e-3,1e-3", seeds=5)
    for run, value in zip(made.runs, [*[1.0] * 10, *ACCURACIES["1e-3"]], strict=True):
        end(run.dir, "finished", value)
    text = str(made.table())
    assert "Best: learning_rate=5e-3. It is distinguishable from learning_rate=1e-3: paired over 5 seeds" in text
    assert (
        "Same difference to the best in every seed, so that no test applies: learning_rate=2e-3." in text
        and "too few" not in text
    )


def test_one_seed_tells_nothing(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID)
    for run, value in zip(made.runs, (0.9, 0.1), strict=True):
        end(run.dir, "finished", value)
    text = str(made.table())
    assert "It cannot be compared with the next (learning_rate=1e-3): they share 1 finished seed." in text
    assert "p =" not in text and "distinguishable" not in text and "--seeds 5 adds four to each" in text
    assert all(line.split()[-1] != "finished" for line in text.splitlines()[4:6])


def test_the_table_before_the_end(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID, seeds=2)
    assert "No run has finished yet." in str(made.table()) and made.table().best is None
    with pytest.raises(InputError, match="no run has finished yet"):
        made.best()
    end(made.runs[2].dir, "finished", 0.4)
    text = str(made.table())
    assert (
        "Provisional: no point has a value of each of its runs." in text
        and "learning_rate=1e-3" in text.splitlines()[4]
    )


def test_finished_runs_whose_metric_is_undefined_are_said(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID, seeds=2)
    end(made.runs[2].dir, "finished", None)
    text = str(made.table())
    assert "eval_accuracy is not defined in 1 finished run, which no mean" in text and "has finished yet" not in text
    with pytest.raises(InputError, match="eval_accuracy is not defined in 1 finished run"):
        made.best()
    end(made.runs[3].dir, "finished", 0.4)
    text = str(made.table())
    assert "is not defined in 1 finished run" in text and "no point has a value of each of its runs" in text
    assert made.best().values == {2: 0.4} and "1/2" in text
    searched = sweep(search=["train.learning_rate=1e-5..1e-1:log"], trials=4, directory="search")
    end(ask(searched, 0), "finished", None)
    assert "eval_accuracy is not defined in 1 finished run" in str(searched.table())


def test_a_metric_of_which_the_least_is_best(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID, overrides=["task=regression", "metrics=[mse, mae]"])
    for run, value in zip(made.runs, (0.3, 0.2), strict=True):
        run.dir.begin_attempt("9.0")
        run.dir.record(
            Outcome(
                outcome="finished",
                exit_code=0,
                attempt="9.0",
                task="regression",
                metrics={"eval_mse": value, "eval_pearson": value},
            )
        )
    table = made.table()
    assert (table.metric, table.direction, made.best().point) == ("eval_mse", "minimize", "learning_rate=1e-3")
    assert made.best("pearson").point == "learning_rate=5e-3"


def test_the_test_split_is_shown_and_chooses_nothing(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID, seeds=2)
    for run, value in zip(made.runs, (0.8, 0.82, 0.6, 0.62), strict=True):
        run.dir.begin_attempt("9.0")
        metrics = {"eval_accuracy": value, "test_accuracy": 1 - value}
        run.dir.record(Outcome(outcome="finished", exit_code=0, attempt="9.0", task="single-label", metrics=metrics))
    table = made.table("test_accuracy")
    assert (table.metric, table.shown) == ("eval_accuracy", "test_accuracy")
    assert table.best is not None and table.best.point == "learning_rate=5e-3", "the best by eval, the worst by test"
    assert table.best.shown is not None and table.best.shown.mean == pytest.approx(0.19)
    text = str(table)
    assert "test_accuracy is only shown" in text and "looked at for the first time" in text
    assert (
        "looked at 1 time before" in str(made.table("test_f1")) and made.best("test_accuracy").point == table.best.point
    )
    assert table.to_dict()["rows"][0]["shown"]["mean"] == pytest.approx(0.19)


def test_warnings_about_the_data_stand_below_the_table_once(sweep: Callable[..., Sweep]) -> None:
    made = sweep(GRID, seeds=2)
    shared, repeated = "3 of 9 rows of test are in train too", "4 of 9 rows of eval repeat an earlier one"
    for run in made.runs:
        end(run.dir, "finished")
        about = {"spoiled": {"eval": [repeated], "test": [shared]}}
        (run.path / "prepared.json").write_text(json.dumps({**run.dir.prepared(), **about}))
    text = str(made.table())
    assert text.count(f"Warning: {repeated}") == 1 and shared not in text


def test_models_of_no_use_are_called_so_and_none_is_best(sweep: Callable[..., Sweep]) -> None:
    """One label for all rows, and fewer right than the majority class."""
    made = sweep("train.learning_rate=1,5e-3,1e-3", seeds=2)
    truth = np.array([0] * 30 + [1] * 20 + [2] * 10)
    constant, worse, good = np.zeros(60, int), np.roll(truth, 20), truth.copy()
    good[:20] = 1
    assert (worse == truth).mean() < 0.5 < (good == truth).mean()

    def ended(number: int, predicted: Any) -> None:
        run = made.dir.run(made.record.cells[number].name)
        write(run.predictions, "single-label", truth, 4 * np.eye(3)[predicted])
        end(run, "finished", float((truth == predicted).mean()))

    for number in range(4):
        ended(number, constant if number < 2 else worse)
    table = made.table()
    text = str(table)
    assert table.best is None and table.to_dict()["best"] is None and "Best" not in text
    assert "No best: every finished point predicts one and the same for all rows" in text
    assert "learning_rate=1: predicts 'one star' for every row of eval." in text
    with pytest.raises(InputError, match="No best"):
        made.best()
    ended(4, good)
    ended(5, good)
    assert made.best().point == "learning_rate=1e-3" and "remark" in str(made.table())
    assert "Passed over" not in str(made.table())
    assert "is not better than always predicting the majority class 'one star'" in made.table().rows[-1].weak
    for number in (2, 3):
        end(made.dir.run(made.record.cells[number].name), "finished", 1.0)
    assert made.best().point == "learning_rate=1e-3"
    assert "Passed over, with a better mean: learning_rate=5e-3 (its models are of no use)." in str(made.table())
