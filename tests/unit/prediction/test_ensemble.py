"""Ensembles of runs: the mean of their probabilities by hand, its scores and differences, predictions with it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.metrics import accuracy_score, log_loss
from tests import tiny
from tests.unit.conftest import Ran

import afina
from afina.errors import InputError
from afina.prediction import jobs as predicting
from afina.prediction.ensemble import make_ensemble
from afina.prediction.request import PredictRequest
from afina.statistics.decision_rule import FILE, DecisionRule
from afina.statistics.paired import compare_paired, compare_with_mean
from afina.statistics.predictions import Predictions, averaged
from afina.worker.predicting import plan_parts, predict_parts
from afina.worker.predicting.parts import made_by

LABELS = ["bad", "fair", "good"]
ROWS = tiny.tiny_reviews(90, 2, stars=3)
TEXTS = [row["text"] for row in ROWS]
TRUTH = [LABELS[row["stars"] - 1] for row in ROWS]


def finished_run(folder: Path, seed: int, labels: Sequence[str], rule: DecisionRule | None = None) -> Path:
    """A finished run, written by hand, with the predictions of its own model; its outputs are in the order of `labels`."""
    (folder / "attempts").mkdir(parents=True)
    tiny.tiny_model(folder / "model", num_labels=3, seed=seed)
    weights = load_file(folder / "model/model.safetensors")
    weights["classifier.weight"] *= 400  # random weights know nothing: so they are sure of it
    save_file(weights, folder / "model/model.safetensors", {"format": "pt"})
    config = json.loads((folder / "model/config.json").read_text())
    config |= {"id2label": dict(enumerate(labels)), "problem_type": "single_label_classification"}
    (folder / "model/config.json").write_text(json.dumps(config))
    recipe = {
        "name": f"member {seed}",
        "model": "m",
        "data": {"files": {"all": "f"}, "text": "text", "label": "stars"},
        "tokens": {"max_length": 40},
    }
    geometry = {
        "nodes": 1, "processes_per_node": 1, "gpus_per_node": 0, "cpus_per_process": 1, "global_batch": 8,
        "batch_per_device": 8, "accumulation": 1,
    }  # fmt: skip
    plan = {"afina_version": "0.1.0", "recipe": recipe, "site": {"scratch": str(folder.parent)}, "geometry": geometry}
    outcome = {
        "outcome": "finished",
        "exit_code": 0,
        "attempt": "local-1",
        "task": "single-label",
        "labels": list(labels),
    }
    for name, value in {"plan": plan, "outcome": outcome, "prepared": {}}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    scores = afina.load(folder).predict_proba(TEXTS)
    columns = {f"score: {name}": scores[:, k] for k, name in enumerate(labels)}
    predicted = [labels[k] for k in scores.argmax(1)]
    pq.write_table(
        pa.table({"text": TEXTS, "label": TRUTH, "prediction": predicted, **columns}), folder / "predictions.parquet"
    )
    if rule is not None:
        (folder / "model" / FILE).write_text(rule.to_json("single-label", labels, "0"))
    return folder


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of them with its outputs in another order, one with a temperature."""
    place = tmp_path_factory.mktemp("it's a $(place)")
    return [
        finished_run(place / "a", 1, LABELS),
        finished_run(place / "b", 2, LABELS[::-1]),
        finished_run(place / "c", 3, LABELS, DecisionRule(0.25)),
    ]


def _probabilities(run: Path) -> np.ndarray[Any, Any]:
    table = pq.read_table(run / "predictions.parquet")
    scores = np.stack([table.column(f"score: {name}").to_numpy() for name in LABELS], 1).astype(np.float64)
    if (run / "model" / FILE).exists():
        scores = scores**4  # over a temperature of one quarter
    return scores / scores.sum(1, keepdims=True)


def test_the_mean_of_probabilities_is_scored_and_predicts(
    members: list[Path], tmp_path: Path, command: Callable[..., Ran]
) -> None:
    out = tmp_path / "committee"
    done = command("ensemble", *members, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((out / "ensemble.json").read_text())
    each = [_probabilities(run) for run in members]
    mean, truth = np.mean(each, axis=0), np.array([LABELS.index(name) for name in TRUTH])
    found, accuracies = record["splits"]["eval"], [accuracy_score(truth, scores.argmax(1)) for scores in each]
    assert found["rows"] == 90 and [m["temperature"] for m in record["members"]] == [1.0, 1.0, 0.25]
    assert found["scores"]["accuracy"][0] == pytest.approx(accuracy_score(truth, mean.argmax(1)))
    assert found["scores"]["log_loss"][0] == pytest.approx(log_loss(truth, mean), abs=1e-6)
    assert found["best"].endswith("abc"[int(np.argmax(accuracies))])
    best, middle = ({d["metric"]: d for d in found[key]} for key in ("against_best", "against_mean"))
    assert best["accuracy"]["first"] == pytest.approx(max(accuracies)) and best["accuracy"]["test"] == "McNemar exact"
    assert middle["accuracy"]["first"] == pytest.approx(np.mean(accuracies))
    assert middle["log_loss"]["first"] == pytest.approx(np.mean([log_loss(truth, scores) for scores in each]), abs=1e-6)
    assert middle["log_loss"]["high"] < 0, "by convexity the mean of probabilities has less loss, row by row"

    data = tiny.write_csv(tmp_path / "new.csv", [{"text": text} for text in [*TEXTS, " "]])
    about = plan_parts.plan(predicting.compose(out, [data], tmp_path / "new.parquet", PredictRequest(chunk_rows=40)))
    predict_parts.run(about["parts"], 0, 1, and_merge=True, progress="log")
    rows = pq.read_table(tmp_path / "new.parquet").to_pylist()
    scores = np.array([[row[f"score: {name}"] for name in LABELS] for row in rows[:-1]])
    assert scores == pytest.approx(mean, abs=1e-5) and np.ptp(mean, axis=0).min() > 1e-3
    assert [row["prediction"] for row in rows[:-1]] == [LABELS[k] for k in mean.argmax(1)] and rows[-1][
        "prediction"
    ] is None
    made = made_by(tmp_path / "new.parquet")
    assert made is not None and made["identity"]["decisions"] == {"members": 3} and len(made["identity"]["model"]) == 3

    shown = command("ensemble", *members, "-o", tmp_path / "again").stdout
    assert "3 members, single-label" in shown and "The best member was chosen on the same rows" in shown
    again = command("ensemble", *members, "-o", out)
    assert again.returncode == 2 and "nothing that exists is overwritten" in again.stderr
    for use in (lambda: afina.load(out), lambda: afina.export(out, tmp_path / "e")):
        with pytest.raises(InputError, match="is an ensemble, not one model"):
            use()


def test_runs_that_do_not_fit_are_refused(members: list[Path], tmp_path: Path) -> None:
    def refused(*runs: Path) -> str:
        with pytest.raises(InputError) as error:
            make_ensemble(runs, tmp_path / "no")
        assert error.value.remedy and not (tmp_path / "no").exists()
        return error.value.message

    def changed(name: str, **values: Any) -> Path:
        run = Path(shutil.copytree(members[0], tmp_path / name))
        (run / "outcome.json").write_text(json.dumps({**json.loads((run / "outcome.json").read_text()), **values}))
        return run

    assert "an ensemble needs more than one run" in refused(members[0], members[0])
    assert "has no model: it is stopped" in refused(members[0], changed("stopped", outcome="stopped", exit_code=75))
    assert "is multi-label" in refused(members[0], changed("task", task="multi-label"))
    assert "other labels than" in refused(members[0], changed("labels", labels=["bad", "fair", "best"]))
    rows = changed("rows") / "predictions.parquet"
    pq.write_table(pq.read_table(rows).slice(10), rows)
    assert "no common rows: eval is not scored: the eval rows differ: 90 and 80" in refused(members[0], rows.parent)


def test_members_are_moved_with_their_ensemble_and_missed(members: list[Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(members[0], tmp_path / "here" / name)
    afina.ensemble(tmp_path / "here", tmp_path / "here/pair")
    data = tiny.write_csv(tmp_path / "a.csv", [{"text": "a"}])
    job = predicting.compose(tmp_path / "here/pair", [data])
    assert [member.model for member in job.members] == [tmp_path / "here" / name / "model" for name in ("one", "two")]
    (tmp_path / "here").rename(tmp_path / "there")
    job = predicting.compose(tmp_path / "there/pair", [data])
    assert [member.model for member in job.members] == [tmp_path / "there" / name / "model" for name in ("one", "two")]
    shutil.rmtree(tmp_path / "there/two")
    with pytest.raises(InputError, match=r"two: a member of .*pair, is not a run directory any more"):
        predicting.compose(tmp_path / "there/pair", [data])


def test_folds_have_no_score_on_rows_that_others_of_them_were_trained_on(
    members: list[Path], tmp_path: Path, command: Callable[..., Ran]
) -> None:
    runs = [Path(shutil.copytree(members[0], tmp_path / f"fold-{number}")) for number in (1, 2)]
    for number, run in enumerate(runs, 1):
        for name, key, values in (
            ("plan", "recipe", {"data": {"files": {"all": "f"}, "text": "text", "label": "stars", "fold": {"of": 2, "number": number}}}),
            ("outcome", "metrics", {"eval_accuracy": 0.5 + number / 10}),
        ):  # fmt: skip
            about = json.loads((run / f"{name}.json").read_text())
            about[key] = {**about.get(key, {}), **values}
            (run / f"{name}.json").write_text(json.dumps(about))
        whole = pq.read_table(run / "predictions.parquet")
        pq.write_table(whole.slice(45 * number - 45, 45), run / "predictions.parquet")
    done = command("ensemble", *runs, "-o", tmp_path / "unscored")
    assert done.returncode == 0, done.stderr
    assert "no score there. How one of them does alone is known: accuracy 0.6500 in the mean" in done.stdout
    assert "A test split would score the ensemble." in done.stdout and "Paired" not in done.stdout
    assert json.loads((tmp_path / "unscored/ensemble.json").read_text())["splits"] == {}
    assert len(predicting.compose(tmp_path / "unscored", [runs[0] / "predictions.parquet"]).members) == 2
    for run in runs:
        pq.write_table(whole, run / "predictions_test.parquet")
    record = make_ensemble(runs, tmp_path / "scored")
    assert list(record["splits"]) == ["test"] and record["splits"]["test"]["rows"] == 90
    for run in runs:
        (run / "prepared.json").write_text(json.dumps({"digest": run.name}))
        (run / "predictions_test.parquet").unlink()
    with pytest.raises(InputError, match="no common rows"):
        make_ensemble(runs, tmp_path / "no")


def test_an_ensemble_of_regressions_and_of_several_labels() -> None:
    draw = np.random.default_rng(0)
    truth = draw.normal(size=400)
    noisy = [Predictions("regression", (), truth, truth + draw.normal(size=400), None, None) for _ in range(4)]
    mean = averaged(noisy)
    assert mean.predicted == pytest.approx(np.mean([m.predicted for m in noisy], axis=0))
    (mse,) = compare_with_mean(noisy, mean, ["mse"])
    assert mse.second < 0.35 < 0.8 < mse.first and mse.high < -0.5 and mse.p < 0.01
    assert (mse.second - mse.first) == pytest.approx(
        np.mean([(mean.predicted - truth) ** 2]) - np.mean([(m.predicted - truth) ** 2 for m in noisy])
    )
    flags = draw.random((400, 2)) < 0.4
    scores = [np.clip(np.where(flags, 0.6, 0.4) + draw.normal(size=flags.shape) * 0.2, 0.01, 0.99) for _ in range(4)]
    several = [Predictions("multi-label", ("a", "b"), flags, each > 0.5, each, None) for each in scores]
    mean = averaged(several)
    assert (mean.predicted == (np.mean(scores, axis=0) > 0.5)).all()
    f1, loss = compare_with_mean(several, mean, ["f1", "log_loss"])
    assert f1.low > 0.05 and f1.p < 0.01 and loss.high < 0
    same = compare_with_mean([several[0]] * 2, several[0], ["f1", "log_loss"])
    assert [d.second - d.first for d in same] == pytest.approx([0, 0]) and all(
        d.low <= 0 <= d.high and d.p == 1 for d in same
    )
    pairwise = {d.metric: d for d in compare_paired(several[0], mean).differences}
    assert compare_with_mean(several[:1], mean, ["f1"])[0].second == pytest.approx(pairwise["f1"].second)
