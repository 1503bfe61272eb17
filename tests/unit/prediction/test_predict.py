"""Predicting for real with a tiny run: its own numbers again, every format and every task."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from tests import tiny
from tests.unit.conftest import Ran
from tests.unit.prediction.conftest import LABELS, here, planned, rows_of

import afina
from afina.cli import main
from afina.cli.model_commands import _summary
from afina.errors import InputError
from afina.prediction import jobs as predicting
from afina.prediction.request import Prediction, folder_of
from afina.statistics.decision_rule import FILE, DecisionRule
from afina.worker.predicting import plan_parts, predict_parts
from afina.worker.task.tasks import TASKS, abstained, prediction_columns


def test_predictions_are_those_of_the_run(
    run: Path, reviews: Path, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    out = tmp_path / "new.parquet"
    done = command("predict", run, reviews, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    own = {row["id"]: row for row in rows_of(run / "predictions.parquet")}
    mine = {row["id"]: row for row in rows_of(out)}
    assert list(mine) == [f"r{number}" for number in range(203)], "not in input order"
    assert len(own) == 46
    for name, row in own.items():
        assert mine[name]["prediction"] == row["prediction"]
        assert [mine[name][f"score: {label}"] for label in LABELS] == pytest.approx(
            [row[f"score: {label}"] for label in LABELS], abs=1e-5
        )
    assert len({row["prediction"] for row in own.values()}) > 1, "one label for all shows nothing"
    assert set(summary["predictions"]) <= set(LABELS) and sum(summary["predictions"].values()) == 203
    assert summary["truncated"] > 10 and "cut, as longer than the model was trained for: " in done.stderr
    assert not folder_of(out).exists()


def test_a_run_is_found_by_its_short_name(
    run: Path, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Ran]
) -> None:
    (scratch / "runs").mkdir()
    (scratch / "runs/stars-1a2b3c4d-1").symlink_to(run)
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    monkeypatch.chdir(tmp_path)
    tiny.write_csv(tmp_path / "new.csv", tiny.tiny_reviews(5, 3))
    job = predicting.compose("stars-1a2b3c4d-1", ["new.csv"])
    assert job.trained and job.model == scratch / "runs/stars-1a2b3c4d-1/model"
    assert predicting.compose("stars", ["new.csv"]).model == job.model
    done = command("export", "stars-1a2b", "-o", run)
    assert done.returncode == 2 and "exists; nothing that exists is overwritten" in done.stderr, done.stderr


def test_every_format_gives_and_takes_the_same(run: Path, place: Path, tmp_path: Path) -> None:
    rows = tiny.tiny_reviews(60, 3)
    folder = tmp_path / "shards"
    folder.mkdir()
    files = {
        "csv": tiny.write_csv(folder / "a.csv", rows),
        "tsv": tiny.write_tsv(tmp_path / "b.tsv", rows),
        "jsonl": tiny.write_jsonl(tmp_path / "c.jsonl", rows),
        "parquet": tiny.write_parquet(tmp_path / "d.parquet", rows),
        "array": tmp_path / "e.json",
    }
    files["array"].write_text(json.dumps(rows))
    wanted: list[dict[str, Any]] | None = None
    for name, file in files.items():
        out = tmp_path / f"{name}.out.parquet"
        here(run, file, out, chunk_rows=25)
        found = [{k: v for k, v in row.items() if k not in ("stars", "rating")} for row in rows_of(out)]
        wanted = wanted or found
        assert found == wanted, name
    assert pq.read_schema(tmp_path / "d.parquet").types == pq.read_schema(tmp_path / "parquet.out.parquet").types[:3]
    assert wanted is not None
    here(run, folder, tmp_path / "out.csv", chunk_rows=25)
    here(run, str(folder / "*.csv"), tmp_path / "out.jsonl", chunk_rows=25)
    table = pa_csv.read_csv(
        tmp_path / "out.csv",
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types={"prediction": pa.string()}),
    )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    def content(row: dict[str, Any]) -> list[Any]:
        return [row["text"], row["prediction"], *(np.float32(row[f"score: {label}"]) for label in LABELS)]

    assert [*map(content, wanted)] == [*map(content, table.to_pylist())] == [*map(content, lines)]


def test_options_of_reading_are_those_of_the_command_else_of_the_training(
    run: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["It’s a phone; what “a” phone", "no £5; never"]
    odd = tmp_path / "odd.csv"
    odd.write_bytes("".join(f"{text}|{n}\n" for n, text in enumerate(texts)).encode("cp1252"))
    plain = tiny.write_csv(tmp_path / "plain.csv", [{"text": text} for text in texts])
    here(run, plain, tmp_path / "plain.parquet")
    options = {"encoding": "cp1252", "delimiter": "|", "header": ["text", "n"]}
    here(run, odd, tmp_path / "odd.parquet", reading=options)
    wanted = rows_of(tmp_path / "plain.parquet")
    assert [{k: v for k, v in row.items() if k != "n"} for row in rows_of(tmp_path / "odd.parquet")] == wanted

    trained = tmp_path / "trained"
    shutil.copytree(run, trained)
    plan = json.loads((trained / "plan.json").read_text())
    plan["recipe"]["data"] |= options
    (trained / "plan.json").write_text(json.dumps(plan))
    capsys.readouterr()
    here(trained, odd, tmp_path / "again.parquet")
    assert "reading as in training: encoding 'cp1252', delimiter '|', header ['text', 'n']" in capsys.readouterr().err
    assert [row["prediction"] for row in rows_of(tmp_path / "again.parquet")] == [row["prediction"] for row in wanted]
    lines = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    here(trained, lines, tmp_path / "lines.parquet", reading={"encoding": "utf-8"})
    assert rows_of(tmp_path / "lines.parquet") == wanted


def test_several_texts_are_joined_by_the_tokenizers_separator(run: Path) -> None:
    model = afina.load(run)
    model.text_columns = None  # as of a folder that does not say how many texts it read in training
    rows = [("a phone", "what", "a day"), ("good", "", "bad"), ("", " ", None)]
    joined = model.predict(["a phone [SEP] what [SEP] a day", "good [SEP]  [SEP] bad", None])
    assert model.predict(rows) == joined and joined[2]["prediction"] is None and joined[0]["prediction"] is not None
    assert model.predict(["a phone"]) != model.predict(["a phone [SEP] what"])


def test_fitted_decisions_are_used_told_and_left_out_on_request(run: Path, reviews: Path, tmp_path: Path) -> None:
    from afina.worker.predicting.parts import made_by

    rule, fitted = DecisionRule(2.5), tmp_path / "run"
    shutil.copytree(run, fitted)
    here(fitted, reviews, tmp_path / "old.parquet")  # a run of before: nothing is fitted
    (fitted / "model" / FILE).write_text(rule.to_json("single-label", LABELS, "0"))
    out, plain, decided = tmp_path / "out.parquet", tmp_path / "plain.parquet", {"temperature": 2.5, "thresholds": {}}
    assert here(fitted, reviews, out)["decisions"] == decided
    assert here(fitted, reviews, plain, plain=True)["decisions"] == {}
    assert rows_of(plain) == rows_of(tmp_path / "old.parquet")
    assert made_by(out)["identity"]["decisions"] == decided and "decisions" not in made_by(plain)["identity"]  # type: ignore[index]
    for one, two in zip(rows_of(out), rows_of(plain), strict=True):
        scores, given = (np.array([row[f"score: {label}"] for label in LABELS]) for row in (one, two))
        softer = given ** (1 / 2.5)
        assert scores == pytest.approx(softer / softer.sum(), abs=1e-5) and one["prediction"] == two["prediction"]
    assert here(fitted, reviews, out)["decisions"] == decided, "whole already"
    with pytest.raises(InputError, match="plain was null, is true"):
        here(fitted, reviews, out, plain=True)
    (fitted / "model" / FILE).write_text("{")
    with pytest.raises(InputError, match=r"decisions\.json cannot be read") as damaged:
        planned(fitted, reviews, tmp_path / "no.parquet")
    assert "--plain" in damaged.value.remedy


def test_thresholds_choose_labels(tmp_path: Path) -> None:
    """Several labels, each above its threshold; of two classes the second one above its own."""
    texts = [row["text"] for row in tiny.tiny_reviews(40, 9)]
    for count, kind in ((3, "multi-label"), (2, "single-label")):
        folder = tiny.tiny_model(tmp_path / kind, num_labels=count, seed=count)
        config = json.loads((folder / "config.json").read_text())
        labels = [f"la,bel {i}" for i in range(count)]
        config |= {"id2label": dict(enumerate(labels)), "problem_type": TASKS[kind].problem_type}
        (folder / "config.json").write_text(json.dumps(config))
        scores = afina.load(folder).predict_proba(texts)
        columns = np.sort(scores.astype(np.float64), axis=0).T[-(count if count > 2 else 1) :]
        gaps = [int(np.diff(column[5:35]).argmax()) + 5 for column in columns]  # far from any score
        limits = tuple(float(column[at : at + 2].mean()) for column, at in zip(columns, gaps, strict=True))
        (folder / FILE).write_text(DecisionRule(thresholds=limits).to_json(kind, labels, "0"))
        found = [row["prediction"] for row in afina.load(folder).predict(texts)]
        if count == 2:
            assert found == [labels[int(score > limits[0])] for score in scores[:, 1]]
        else:
            assert found == [
                [name for name, above in zip(labels, row > limits, strict=True) if above] for row in scores
            ]
        assert (afina.load(folder).predict_proba(texts) == scores).all()


def test_unsure_texts_are_left_unanswered_and_counted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": row["text"], "confidence": 1} for row in tiny.tiny_reviews(40, 9)] + [
        {"text": " ", "confidence": 1}
    ]
    data = tiny.write_jsonl(tmp_path / "new.jsonl", rows)
    with pytest.raises(InputError, match="has a column `confidence`"):
        planned(run, data, tmp_path / "out.parquet", abstain_below=0.5)
    here(run, data, tmp_path / "all.parquet")
    everything = rows_of(tmp_path / "all.parquet")
    least = sorted(max(row[f"score: {label}"] for label in LABELS) for row in everything[:-1])[20]
    summary = predict_parts.run(
        planned(run, data, tmp_path / "out.parquet", keep="id", abstain_below=least)["parts"],
        0,
        1,
        and_merge=True,
        progress="log",
    )["summary"]
    assert summary["unanswered"] == 20 and summary["blank"] == 1 and sum(summary["predictions"].values()) == 20
    for whole, row in zip(everything[:-1], found := rows_of(tmp_path / "out.parquet"), strict=False):
        assert row["confidence"] == max(row[f"score: {label}"] for label in LABELS)
        assert row["prediction"] == (whole["prediction"] if row["confidence"] >= least else None)
    assert found[-1]["confidence"] is found[-1]["prediction"] is None, "a blank text"
    shown = {"out": "o", "state": "begun", "seconds": 1.0, "rows_per_s": 41.0, "decisions": {}, **summary}
    assert "  unanswered: 20 of 40 texts (50.0%)" in _summary(shown).splitlines()


def test_of_several_labels_the_least_sure_one_counts() -> None:
    logits = np.log(np.array([[9, 9, 1 / 9], [9, 1.5, 1 / 9], [np.nan] * 3]), dtype=np.float32)
    columns, count = abstained("multi-label", prediction_columns("multi-label", ["a", "b", "c"], logits), 0.7)
    assert columns["prediction"].to_pylist() == [["a", "b"], None, None] and count == 1
    assert columns["confidence"].to_pylist() == [pytest.approx(0.9), pytest.approx(0.6), None]


def test_blank_texts_have_no_prediction_and_rows_are_named(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "great"}\n\n{"text": "  "}\n{"other": 1}\n{"text": null}\n{"text": "awful"}\n')
    out = tmp_path / "out.parquet"
    here(run, data, out, keep="id", chunk_rows=2)  # the second chunk has no text at all
    rows = rows_of(out)
    assert [row["row"] for row in rows] == [1, 3, 4, 5, 6], "the line, blank lines counted"
    assert {row["file"] for row in rows} == {str(data)}
    assert [row["prediction"] is None for row in rows] == [False, True, True, True, False]
    assert [row["score: 1"] is None for row in rows] == [False, True, True, True, False]
    from afina.worker.predicting.parts import made_by

    made = made_by(out)
    assert made is not None
    assert made["summary"]["blank"] == 3
    assert made["summary"]["blank_rows"] == [f"{data}, line {n}" for n in (3, 4, 5)]
    assert any("3 of 5 rows" in line and ", line 3" in line for line in predict_parts._warnings(made["summary"]))


def test_a_pipe(run: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers in this process, to save their starts: other tests start them."""

    def ask_worker(argv: list[str], env: Any, question: Any = None, *, name: str) -> dict[str, Any]:
        stage, *words = argv[argv.index("afina.worker") + 2 :]
        return (
            plan_parts.plan(Prediction.model_validate(question)) if stage == "plan" else predict_parts.merge(words[0])
        )

    def ask_workers(argvs: list[list[str]], *_: Any, **__: Any) -> list[dict[str, Any]]:
        return [predict_parts.run(argv[argv.index("run") + 1], 0, 1, and_merge=False, progress="log") for argv in argvs]

    monkeypatch.setattr(predicting, "ask_worker", ask_worker)
    monkeypatch.setattr(predicting, "ask_workers", ask_workers)
    texts = "what a great thing\n\nit was awful, broken ☃\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(texts.encode())))
    main(["predict", str(run), "-"])
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == texts.splitlines()
    assert [line["prediction"] is None for line in lines] == [False, True, False]
    assert sum(lines[0][f"score: {label}"] for label in LABELS) == pytest.approx(1, abs=1e-5)
    assert not any(Path.cwd().iterdir())


@pytest.mark.parametrize("task", ["multi-label", "regression", "pairs"])
def test_every_task_has_its_columns(task: str, tmp_path: Path) -> None:
    """Against Transformers itself, unpacked: sigmoids and lists of names, a number, pairs of texts."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    count = {"multi-label": 3, "regression": 1, "pairs": 2}[task]
    folder = tiny.tiny_model(tmp_path / "model", num_labels=count)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): f"la,bel {i}" for i in range(count)}
    if task != "pairs":
        config["problem_type"] = "regression" if task == "regression" else "multi_label_classification"
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"text": r["text"], "other": r["text"][::-1]} for r in tiny.tiny_reviews(40, 5)]
    data = tiny.write_parquet(tmp_path / "data.parquet", rows)
    columns = ["text", "other"] if task == "pairs" else []
    here(folder, data, tmp_path / "out.parquet", text=columns)
    here(folder, data, tmp_path / "out.csv", text=columns)
    table = pq.read_table(tmp_path / "out.parquet")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    second = [row["other"] for row in rows] if task == "pairs" else None
    inputs = tokenizer([row["text"] for row in rows], second, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model.eval()(**inputs).logits
    decided = table.column("prediction").to_pylist()
    if task == "regression":
        assert table.column_names == ["text", "other", "prediction"]
        assert decided == pytest.approx(logits[:, 0].tolist(), abs=1e-5)
        return
    names = list(config["id2label"].values())
    scores = torch.sigmoid(logits) if task == "multi-label" else torch.softmax(logits, -1)
    for number, name in enumerate(names):
        assert table.column(f"score: {name}").to_pylist() == pytest.approx(scores[:, number].tolist(), abs=1e-5)
    if task == "multi-label":
        assert decided == [[n for n, score in zip(names, row, strict=True) if score > 0.5] for row in scores.tolist()]
        cells = pa_csv.read_csv(tmp_path / "out.csv", parse_options=pa_csv.ParseOptions(newlines_in_values=True))
        assert [json.loads(cell) for cell in cells.column("prediction").to_pylist()] == decided
    else:
        assert decided == [names[i] for i in logits.argmax(-1).tolist()]
