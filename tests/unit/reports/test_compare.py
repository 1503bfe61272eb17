"""afina compare, and finding runs below folders: differences, tests, a thousand runs, wrong input."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.conftest import Ran, tree
from tests.unit.reports.pages import Page, data_of
from tests.unit.statistics.test_scores import write

from afina.errors import InputError
from afina.recipe.schema import Recipe
from afina.reports.compare import compare, names_of, to_json, verdicts
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.outcome import Outcome
from afina.run.plan import make_plan
from afina.run.provenance.methods import execution_differences, execution_of
from afina.run.provenance.split_looks import times_looked
from afina.site.settings import Site
from afina.watch.find import find_runs
from afina.watch.reading import read_result

MakeRun = Callable[..., Path]
#: Name, share of right predictions, seed, learning rate.
RUNS = (("base", 0.6, 0, 5e-5), ("better", 0.95, 1, 1e-4), ("worse", 0.5, 2, 1e-3))


@pytest.fixture
def make_run(tmp_path: Path, site: Site, recipe: Callable[..., Recipe], model_folder: Path) -> MakeRun:
    """Makes runs with 200 predictions, of which a share is right."""

    def make(name: str, right: float = 0.8, seed: int = 0, size: int = 200, **changes: Any) -> Path:
        plan = make_plan(
            recipe(model=str(model_folder), **changes), site, recipe_file=tmp_path / "re cipes, 'mine'/recipe.yaml"
        )
        run = claim(plan, {"labels": ["a", "b"]}, ["python"], "", tmp_path / name)
        truth = np.random.default_rng(size).integers(0, 3, size)
        predicted = np.where(np.random.default_rng(seed).random(size) < right, truth, (truth + 1) % 3)
        write(run.predictions, "single-label", truth, 4 * np.eye(4)[predicted])
        metrics = {"eval_accuracy": float((truth == predicted).mean()), "eval_loss": 0.5, "eval_f1_per_class": [1.0]}
        run.begin_attempt("local-1")
        run.record(
            Outcome(
                outcome="finished",
                exit_code=0,
                attempt="local-1",
                task="single-label",
                metrics=metrics,
                samples_per_second=9.5,
            )
        )
        return run.path

    return make


def test_differences_and_their_tests(make_run: MakeRun) -> None:
    runs = [
        make_run("base", 0.6),
        make_run("better", 0.95, 1, train__learning_rate=1e-4),
        make_run("alike", 0.6, train__seed=2),
    ]
    found = compare(runs)
    assert found.names == ("base", "better", "alike")
    assert found.recipe == {"train.learning_rate": [5e-5, 1e-4, 5e-5], "train.seed": [1, 1, 2]}
    assert set(found.metrics) == {"accuracy", "loss"} and found.about["samples_per_second"] == [9.5] * 3
    better, alike = verdicts(found)
    assert better.paired is not None and alike.paired is not None
    first = better.paired.differences[0]
    assert (first.metric, first.test) == ("accuracy", "McNemar exact") and first.p < 1e-6 and first.low > 0.2
    assert better.p_corrected == pytest.approx(2 * first.p), "two runs are tested"
    assert alike.paired.differences[0].p == 1.0 and (alike.paired.only_first, alike.paired.only_second) == (0, 0)
    assert verdicts(found, "f1")[0].paired.differences[0].metric == "f1"  # type: ignore[union-attr]
    assert json.loads(json.dumps(to_json(found, [better, alike]), allow_nan=False))["tests"][0]["paired"]["rows"] == 200


def test_a_comparison_is_a_page_with_curves_over_each_other(
    make_run: MakeRun, command: Callable[..., Ran], tmp_path: Path
) -> None:
    runs = [make_run(name, right, seed, train__learning_rate=rate) for name, right, seed, rate in RUNS]
    for run, (_, right, *_) in zip(runs, RUNS, strict=True):
        steps = [{"step": step, "eval_loss": 1 / step, "eval_accuracy": right - 1 / step} for step in (10, 20, 30)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    shown = command("compare", *runs, "--html", tmp_path / "a page")
    assert shown.stdout.endswith(f"{tmp_path / 'a page/index.html'}\n")
    page = Page(tmp_path / "a page/index.html")
    assert page.headings[1:4] == ["Scores", "Tests", "Learning curves"]
    svgs = page.svgs()
    assert json.loads(str(svgs["curves-score"].get("data-names"))) == ["base", "better", "worse"]
    for part, (_, right, *_) in zip(("d0", "d1", "d2"), RUNS, strict=True):
        assert [y for _, y in data_of(svgs["curves-score"], part)[0]] == pytest.approx(
            [right - 1 / step for step in (10, 20, 30)], abs=2e-3
        )
    assert {"runs", "curves-eval-loss", "effect-train.learning_rate"} <= svgs.keys() and "curves-loss" not in svgs
    first = verdicts(compare(runs))[0].paired.differences[0]  # type: ignore[union-attr]
    row = next(row for row in page.rows if row[:2] == ["better (200 rows)", "accuracy"])
    assert row[2:5] == [f"{first.first:.4f}", f"{first.second:.4f}", f"{first.second - first.first:+.4f}"]
    assert (tmp_path / "a page/curves-score.svg").is_file()
    assert json.loads(command("compare", *runs, "--html", tmp_path / "b", "--json").stdout)["report"]


def test_warnings_stand_below_the_table(make_run: MakeRun, command: Callable[..., Ran]) -> None:
    runs = [make_run("base"), make_run("other", train__seed=2)]
    warned = {
        **json.loads((runs[1] / "outcome.json").read_text()),
        "warnings": ["3 of 200 rows of eval are in train too"],
    }
    (runs[1] / "outcome.json").write_text(json.dumps(warned))
    shown = command("compare", *runs, "--no-test")
    assert (
        "warning: other: 3 of 200 rows of eval are in train too" in shown.stdout and shown.stdout.count("warning") == 1
    )
    found = to_json(compare(runs), None)
    assert [run["warnings"] for run in found["runs"]] == [[], ["3 of 200 rows of eval are in train too"]]


def test_runs_are_compared_on_test_and_each_look_is_counted(make_run: MakeRun, command: Callable[..., Ran]) -> None:
    runs = [make_run("one", 0.6), make_run("two", 0.9)]
    for number, run in enumerate(runs):
        truth = np.arange(90) % 3
        predicted = np.where(np.arange(90) < 30 * (2 - number), truth, (truth + 1) % 3)
        write(run / "predictions_test.parquet", "single-label", truth, 4 * np.eye(4)[predicted])
        outcome = json.loads((run / "outcome.json").read_text())
        outcome["metrics"]["test_accuracy"] = float((truth == predicted).mean())
        (run / "outcome.json").write_text(json.dumps(outcome))
    found = compare(runs, "test")
    assert found.metrics == {"accuracy": [pytest.approx(2 / 3), pytest.approx(1 / 3)]}
    tested = verdicts(found)[0].paired
    assert tested is not None and tested.rows == 90 and tested.differences[0].first == pytest.approx(2 / 3)
    first, second = (command("compare", *runs, "--split", "test") for _ in range(2))
    assert first.returncode == 0 and "looked at for the first time" in first.stdout, first
    assert "looked at 1 time before" in second.stdout and "too kind" in second.stdout
    assert "looked" not in command("compare", *runs).stdout and times_looked(runs[0]) == 2
    assert "test_" not in " ".join(compare(runs).metrics)


def test_a_best_metric_of_probabilities_is_tested_and_ones_own_is_not(make_run: MakeRun) -> None:
    runs = [
        make_run(name, right, train__best_metric="auroc", metrics=["accuracy", "auroc"])
        for name, right in (("a", 0.6), ("b", 0.9))
    ]
    for run in runs:
        outcome = json.loads((run / "outcome.json").read_text())
        outcome["metrics"] |= {"eval_auroc": 0.5, "eval_total": 3.0}
        (run / "outcome.json").write_text(json.dumps(outcome))
    paired = verdicts(compare(runs))[0].paired
    assert paired is not None and paired.differences[0].metric == "auroc" and paired.differences[0].p < 0.05
    own = [make_run(name, 0.6, metrics=["accuracy", "m:total"], train__best_metric="total") for name in ("c", "d")]
    assert verdicts(compare(own))[0].paired.differences[0].metric == "accuracy"  # type: ignore[union-attr]
    with pytest.raises(InputError, match="`total` is not a score that can be tested"):
        verdicts(compare(own), "total")


def test_versions_and_precision_that_differ_are_shown(make_run: MakeRun) -> None:
    runs = [make_run("a"), make_run("b")]
    for run, version in zip(runs, ("5.17", "5.18"), strict=True):
        env = {"python": "3.12", "versions": {"torch": "2.13", "transformers": version}, "hardware": {"cpu": "x"}}
        (run / "attempts/local-1/env.json").write_text(json.dumps(env))
        RunDir(run).event("precision", precision="bf16" if version == "5.18" else "fp32", device={"kind": "cpu"})
    about = compare(runs).about
    assert about["transformers"] == ["5.17", "5.18"] and about["precision"] == ["fp32", "bf16"] and "torch" not in about
    ran = [execution_of(RunDir(run)) for run in runs]
    assert execution_differences(*ran) == ["precision: fp32 then, bf16 now", "transformers: 5.17 then, 5.18 now"]


def test_runs_that_cannot_be_tested_have_a_reason_and_the_others_are_tested(
    make_run: MakeRun, command: Callable[..., Ran]
) -> None:
    runs = [make_run("a"), make_run("other rows", size=150), make_run("gone"), make_run("fine", 0.9)]
    (runs[2] / "predictions.parquet").unlink()
    results = verdicts(compare(runs))
    assert [r.paired is None for r in results] == [True, True, False]
    assert "the eval rows differ: 200 and 150" in str(results[0].why_not) and "is missing" in str(results[1].why_not)
    done = command("compare", *runs)
    assert done.returncode == 0 and done.stderr == ""
    assert "not possible: the eval rows differ: 200 and 150" in done.stdout and "McNemar exact (" in done.stdout
    assert done.stdout.startswith("The recipes are the same.\n")


def test_the_command_prints_json(make_run: MakeRun, command: Callable[..., Ran], tmp_path: Path) -> None:
    make_run("runs/one")
    make_run("runs/two", 0.9)
    before = tree(tmp_path / "runs")
    done = command("compare", tmp_path / "runs", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and [run["name"] for run in answer["runs"]] == ["one", "two"]
    assert answer["tests"][0]["paired"]["differences"][0]["metric"] == "accuracy"
    assert "tests" not in json.loads(command("compare", tmp_path / "runs", "--json", "--no-test").stdout)
    assert tree(tmp_path / "runs") == before, "comparing changes nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder, and no run or sweep of that name below "),
        (["one"], "one run alone cannot be compared"),
        (["one", "./one"], "one run alone cannot be compared"),
        (["one", "two", "--metric", "acuracy"], "`acuracy` is not a score that can be tested"),
    ],
)
def test_wrong_input(
    make_run: MakeRun,
    command: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run("one")
    make_run("two")
    done = command("compare", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and "remedy: " in done.stderr, done
    assert done.stdout == ""


def test_damaged_runs_stay_in_the_table(make_run: MakeRun) -> None:
    runs = [make_run("a"), make_run("b"), make_run("c")]
    (runs[1] / "plan.json").write_text("{")
    (runs[2] / "outcome.json").write_text("[]")
    found = compare(runs)
    assert found.metrics["accuracy"][2] is None and found.runs[1].recipe == {} and found.runs[2].outcome == {}
    assert found.about["outcome"] == ["finished", "finished", None]


def test_a_thousand_runs_are_read_in_seconds(make_run: MakeRun, tmp_path: Path, command: Callable[..., Ran]) -> None:
    one = make_run("one")
    folder = tmp_path / "many"
    for number in range(1000):
        (folder / f"cell-{number}").mkdir(parents=True)
        for name in ("plan.json", "outcome.json"):
            shutil.copyfile(one / name, folder / f"cell-{number}" / name)
    began = time.process_time()
    found = compare([folder])
    assert len(found.runs) == 1000 and found.recipe == {} and found.names[:3] == ("cell-0", "cell-1", "cell-2")
    assert time.process_time() - began < 5, "0.4 s on an idle core"
    done = command("compare", folder)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1002, "no tests, one row a run"


def test_runs_are_found_below_folders_and_not_in_their_own(make_run: MakeRun, tmp_path: Path) -> None:
    for name in ("x/runs/cell-10", "x/runs/cell-9", "x/deep/er"):
        make_run(name)
    (tmp_path / "x/.hidden").mkdir()
    shutil.copy(tmp_path / "x/deep/er/plan.json", tmp_path / "x/.hidden/plan.json")
    (tmp_path / "x/deep/er/attempts/local-1/plan.json").write_text("{}")
    (tmp_path / "x/loop").symlink_to(tmp_path / "x")
    found = find_runs([tmp_path / "x"])
    assert [str(p.relative_to(tmp_path)) for p in found if "loop" not in p.parts] == [
        "x/deep/er",
        "x/runs/cell-9",
        "x/runs/cell-10",
    ]
    assert find_runs([found[0]]) == [found[0]]
    with pytest.raises(InputError, match="no such folder"):
        find_runs([tmp_path / "absent"])


def test_names_are_as_short_as_can_be() -> None:
    assert names_of([Path("/a/x/1"), Path("/a/y/2")]) == ["1", "2"]
    assert names_of([Path("/a/x/1"), Path("/a/y/1")]) == ["x/1", "y/1"]


def test_a_result_is_read_without_validation(make_run: MakeRun) -> None:
    result = read_result(make_run("it's one", train__best_metric="f1"))
    assert result.metric is None and result.flat_recipe()["train.learning_rate"] == 5e-5
    assert set(result.metrics) == {"accuracy", "loss"}
    assert read_result(make_run("another")).metric == "accuracy"


def test_one_run_alone() -> None:
    with pytest.raises(InputError, match="one run alone"):
        compare([])
