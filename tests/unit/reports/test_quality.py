"""What a page says about the model: scores beside simple models, decisions, warnings, intervals, mistakes."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
from tests.unit.reports.conftest import CURVE, EVIL, MakeRun, finish, log, predict
from tests.unit.reports.pages import Page

from afina.reports import write_report


def test_simple_models_stand_beside_the_model_with_their_differences(make_run: MakeRun) -> None:
    run = make_run()
    one = {
        "metric": "accuracy", "first": 0.8125, "second": 0.75, "low": -0.1, "high": 0.02, "p": 0.21,
        "test": "McNemar",
    }  # fmt: skip
    tfidf = {"name": "TF-IDF and logistic regression", "rows": 500, "of": 600, "seconds": 1.0}
    models = [
        {**about, "scores": {"accuracy": [0.8125, 0.7, 0.9]}, "differences": [one]}
        for about in ({"name": "most"}, tfidf)
    ]
    embedded = {
        **models[1],
        "name": "frozen embeddings and logistic regression",
        "features": "over vectors",
        "compared": [40, 600],
    }
    left_out = {"name": "frozen embeddings", "left_out": "no memory", "scores": {}, "differences": []}
    finish(run, baselines={"eval": [*models, embedded]})
    text = Page(write_report(run.path)).text
    assert (
        "frozen embeddings and logistic regression over vectors, texts cut" in text
        and "; compared on a sample of 40 of 600 rows." in text
    )
    assert "over vectors, 500 rows of train) had accuracy 0.8125 on 40 rows of eval, this model 0.75." in text
    finish(run, baselines={"eval": [*models, left_out]})
    text = Page(write_report(run.path)).text
    assert "frozen embeddings: left out: no memory" in text
    assert "0.8125" in text and "-0.0625" in text and "-0.1000" in text and "a sample of 500 of 600 rows" in text
    assert (
        text.count("the model is not better than TF-IDF and logistic regression: accuracy on eval 0.75 against 0.8125")
        == 1
    )
    assert "had accuracy 0.8125 on eval, this model 0.75." in text, "in Methods"
    finish(run)
    assert "TF-IDF" not in Page(write_report(run.path)).text


def test_fitted_decisions_have_a_section_with_what_they_change(make_run: MakeRun) -> None:
    run = make_run()
    f1 = {
        "metric": "f1", "first": 0.5, "second": 0.625, "low": 0.03125, "high": 0.25, "p": 0.01,
        "test": "paired bootstrap",
    }  # fmt: skip
    record = {"temperature": 2.5, "thresholds": {"1": 0.25}, "notes": ["2: the threshold is 0.5: few"], "rows": 200}
    finish(
        run,
        decisions={
            **record,
            "measured_on": "eval",
            "cross_fitted": True,
            "calibration_error": [0.25, 0.125],
            "differences": [f1],
        },
    )
    text = Page(write_report(run.path)).text
    for shown in (
        "-0.1250",
        "+0.1250",
        "+0.0312",
        "+0.2500",
        "0.010",
        "2: the threshold is 0.5: few",
        "each fifth of its rows",
    ):
        assert shown in text, shown
    assert (
        "Temperature 2.5, fitted on eval; on eval, each fifth of its rows by what was fitted on the others" in text
    ), "Methods"
    finish(
        run,
        decisions={"temperature": None, "thresholds": {}, "notes": ["no temperature: there are 3 rows, 50 are needed"]},
    )
    text = Page(write_report(run.path)).text
    assert "Nothing was fitted." in text and "there are 3 rows" in text and "--plain leaves them out" not in text
    finish(run)
    assert "Fitted decisions" not in Page(write_report(run.path)).text


SHARED = "12 of 200 rows of eval are in train too, as the model reads them: b.csv, row 1 = a.csv, row 5"


def test_a_warning_about_the_data_stands_beside_the_numbers_that_it_spoils(make_run: MakeRun) -> None:
    run = make_run()
    finish(run, warnings=[SHARED, "the model gives every text the label '1'"])
    log(run, *CURVE)
    about = json.loads((run.path / "prepared.json").read_text())
    (run.path / "prepared.json").write_text(json.dumps({**about, "spoiled": {"eval": [SHARED], "test": ["none here"]}}))
    text = Page(write_report(run.path)).text
    assert text.count(SHARED) == 3, "at the top, epochs, classes"
    assert text.count("the model gives every text") == 1 and "none here" not in text
    # As an older afina recorded it.
    old = "3 of 200 rows of eval are in train too, word for word: b.csv, row 1 = a.csv, row 5"
    (run.path / "prepared.json").write_text(json.dumps({**about, "warnings": [old]}))
    assert Page(write_report(run.path)).text.count(old) == 4


def test_models_of_no_use_are_called_so(make_run: MakeRun) -> None:
    """By the run, or where it is older than that by what its predictions say."""
    run = make_run()
    finish(run)
    predict(run)
    table = pq.read_table(run.predictions)
    same = table.set_column(table.column_names.index("prediction"), "prediction", pa.array(["2"] * len(table)))
    pq.write_table(same, run.predictions)
    assert "the model predicts '2' for every row of eval" in Page(write_report(run.path)).text
    outcome = json.loads(run.outcome_file.read_text())
    run.outcome_file.write_text(json.dumps({**outcome, "warnings": ["the loss diverged"]}))
    text = Page(write_report(run.path)).text
    assert "the loss diverged" in text and "for every row" not in text


def test_metrics_of_ones_own_and_undefined_ones_are_shown(make_run: MakeRun) -> None:
    run = make_run(metrics=["accuracy", "costs:total:lower", "auroc"], train__best_metric="total")
    undefined = {"total": "costs.total returned None"}
    metrics = {"eval_total": 1.25, "test_total": None, "test_undefined": undefined, "test_loss": 0.5}
    finish(run, metrics=metrics, task="single-label")
    predict(run)
    predict(run, part="_test")
    page = Page(write_report(run.path))
    assert ["total", "1.2500", "–", "–", "–"] in page.rows and "total on eval" in page.text
    assert "total: no interval; a metric of one's own is computed once, on all rows" in page.text
    assert "total is not defined on test: costs.total returned None." in page.text
    assert sum(row[0] == "auroc" for row in page.rows) == 2 and "kappa_quadratic" not in page.text


def test_predictions_give_intervals_calibration_and_mistakes(make_run: MakeRun) -> None:
    run = make_run()
    finish(run, metrics={"eval_loss": 0.5})
    predict(run)
    page = Page(write_report(run.path))
    assert next(row for row in page.rows if row[:1] == ["1"] and "(" in row[-1])[:2] == ["1", "30"]
    first, second, third = (next(r for r in page.rows if r[0] == k and "(" in r[-1]) for k in "123")
    assert first[3] == "1.0000 (0.8587–1.0000)" and re.fullmatch(r"0\.5000 \(0\.3\d+–0\.6\d+\)", second[3]), second
    assert third[2] == "–", "never predicted: precision is not defined"
    assert all(re.fullmatch(r"0\.0000 \(0\.0000–0\.[12]\d+\)", cell) for cell in third[3:]), third
    assert ["2", "15", "15", "0"] in page.rows, "the confusion matrix, from the predictions"
    assert ["3", "1", "30", "100.0%"] in page.rows and ["2", "1", "15", "50.0%"] in page.rows, "its confusions"
    assert "expected calibration error on eval" in page.text and "of 15 equal bins" in page.text
    assert page.headings[page.headings.index("Mistakes") :][1:3] == [
        "3 predicted as 1: 30 rows, 100.0% of the label",
        "2 predicted as 1: 15 rows, 50.0% of the label",
    ]
    mistakes = [row for row in page.rows if len(row) == 4 and row[1].startswith("r")]
    assert len(mistakes) == 10 and mistakes[0][:3] == ["89", "r89", "0.9450"]
    assert all(len(row[3]) == 300 and row[3].endswith("…") for row in mistakes)
    assert "Rows of some where/reviews.csv" in page.text
    assert re.search(
        r"accuracy on eval0\.500095 % interval 0\.[34]\d+ to 0\.6\d+; 0\.3333 by the simplest model",
        page.text,
    )
    svgs = page.svgs()
    bars = [
        group for group in svgs["calibration-eval"].iter("g") if str(group.get("id")).startswith("calibration-eval-b")
    ]
    counts = [row for row in page.rows if re.fullmatch(r"0\.\d\d–[01]\.\d\d", row[0])]
    assert len(bars) == len(counts) == len(re.findall("confidence", str(svgs["calibration-eval"].find("desc").text)))  # type: ignore[union-attr]
    assert sum(int(row[1]) for row in counts) == 90
    assert {"pr-eval", "roc-eval", "score", "classes-eval"} <= svgs.keys()


def test_texts_are_escaped_and_can_be_left_out(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    predict(run, texts=[EVIL + "\n\x00 two lines"] * 90)
    page = Page(write_report(run.path))
    assert "script" not in page.names and page.text.count(EVIL) == 10
    page = Page(write_report(run.path, texts=False))
    assert EVIL not in page.text and "r89" in page.text


def test_many_labels_become_the_most_frequent_confusions(make_run: MakeRun) -> None:
    run = make_run()
    names = [f"label {i}" for i in range(80)]
    matrix = [[10 if i == j else 3 if j == i + 1 else 0 for j in range(80)] for i in range(80)]
    finish(run, labels=names, metrics={"eval_confusion_matrix": matrix})
    page = Page(write_report(run.path))
    assert ["label 0", "label 1", "3", "23.1%"] in page.rows and "30 most frequent of 79 confusions" in page.text
    assert len(page.source) < 90_000


def test_damaged_predictions_are_reported_in_their_place(make_run: MakeRun) -> None:
    run = make_run()
    finish(run)
    (run.path / "predictions.parquet").write_bytes(b"PAR1 and no more")
    page = Page(write_report(run.path))
    assert "predictions.parquet: cannot be read as predictions" in page.text and "Confusion matrix" in page.headings
