"""One page for many runs, and for a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote

from scipy import stats
from tests.unit.reports.conftest import MakeRun, finish
from tests.unit.reports.pages import Page

from afina.reports import write_report


def test_many_runs_have_one_page(make_run: MakeRun, tmp_path: Path) -> None:
    for number, (rate, accuracy) in enumerate(((1e-5, 0.5), (2e-5, 0.9), (3e-5, None)), start=1):
        run = make_run(train__learning_rate=rate)
        if accuracy is not None:
            finish(run, metrics={"eval_accuracy": accuracy}, task="single-label", seconds=60.0)
        (tmp_path / "sw eep/runs").mkdir(parents=True, exist_ok=True)
        run.path.rename(tmp_path / f"sw eep/runs/cell {number}")
    (tmp_path / "sw eep/sweep.json").write_text(
        json.dumps({"grid": {"train.learning_rate": ["1e-5", "2e-5"]}, "seeds": [1, 2], "plan": {"a": "b"}})
    )
    page = Page(write_report(tmp_path / "sw eep"))
    table = [row for row in page.rows if row[0].startswith("cell")]
    assert [row[:4] for row in table] == [
        ["cell 2", "2e-05", "finished", "0.9000"],
        ["cell 1", "1e-05", "finished", "0.5000"],
        ["cell 3", "3e-05", "no outcome", "–"],
    ]
    assert "3 of the runs have no page" in page.text and not any("cell" in link for link in page.links)
    assert ["train.learning_rate", "1e-5, 2e-5"] in page.rows and ["seeds", "1, 2"] in page.rows
    page = Page(write_report(tmp_path / "sw eep", each=True))
    linked = [link for link in page.links if not link.startswith("#")]
    assert linked[0] == "../runs/cell%202/report/index.html" and len(linked) == 3
    assert all((tmp_path / "sw eep/report" / unquote(link)).is_file() for link in linked)


def test_a_sweep_is_headed_by_the_mean_of_its_best_point(make_run: MakeRun, tmp_path: Path) -> None:
    """Not by its luckiest seed; Student's interval as SciPy gives it."""
    values = {1e-5: (0.80, 0.82, 0.90), 2e-5: (0.85, 0.86, 0.87), 3e-5: (0.99,)}
    for rate, accuracies in values.items():
        for seed, accuracy in enumerate((*accuracies, *[None] * (3 - len(accuracies)))):
            run = make_run(train__learning_rate=rate, train__seed=seed)
            if accuracy is not None:
                finish(run, metrics={"eval_accuracy": accuracy}, task="single-label")
            (tmp_path / "sweep/runs").mkdir(parents=True, exist_ok=True)
            run.path.rename(tmp_path / f"sweep/runs/{rate},{seed}")
    page = Page(write_report(tmp_path / "sweep", output=tmp_path / "page"))
    low, high = stats.t.interval(0.95, 2, loc=0.86, scale=stats.sem(values[2e-5]))
    assert ["learning_rate=2e-05", "0.8600", f"{low:.4f}–{high:.4f}", "3/3", "best", "–"] in page.rows
    test = stats.ttest_rel(values[1e-5], values[2e-5])
    limits, difference = test.confidence_interval(), sum(values[1e-5]) / 3 - 0.86
    assert page.rows[page.rows.index(next(r for r in page.rows if r[0] == "learning_rate=1e-05"))][4:] == [
        f"{difference:+.4f} ({limits.low:+.4f} to {limits.high:+.4f})",
        f"{test.pvalue:.3f}",
    ]
    assert "It is NOT distinguishable from the next (learning_rate=1e-05): paired over 3 seeds" in page.text
    effect = page.svgs()["effect-train.learning_rate"]
    assert effect.get("data-scale") == "linear" and "2e-05: mean 0.8600" in str(effect.find("desc").text)  # type: ignore[union-attr]
    assert f"learning_rate=2e-05: mean of 3 seeds, 95 % interval {low:.4f} to {high:.4f}" in page.text
    first = [row[0] for row in page.rows if row[0].startswith("learning_rate=")]
    assert first == ["learning_rate=2e-05", "learning_rate=3e-05", "learning_rate=1e-05"], (
        "by their means, as the sweep's own table; but one seed of three does not win"
    )
