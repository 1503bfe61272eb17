"""Predicting for real with a tiny run: its own numbers again, every format, killed and resumed, refused, shared out as jobs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from tests import tiny
from tests.common import ROOT, program
from tests.unit.conftest import Ran, tree
from tests.unit.forks import ForkedWorkers
from tests.unit.training.in_process import train_here

import afina
from afina.cli import main
from afina.cli.model_commands import _summary
from afina.errors import AfinaError, InputError
from afina.prediction import jobs as predicting
from afina.prediction.request import Prediction, PredictRequest, folder_of
from afina.statistics.decision_rule import FILE, DecisionRule
from afina.worker.__main__ import main as door
from afina.worker.predicting import plan_parts, predict_parts
from afina.worker.predicting.parts import Parts
from afina.worker.task.tasks import TASKS, abstained, prediction_columns

LABELS = ["1", "2", "3", "4", "5"]


def train(place: Path) -> None:
    """A run of a tiny BERT on the reviews in `place`."""
    recipe = tiny.recipe(
        name="stars it's",
        data={"id": "id"},
        tokens={"max_length": 24},
        train={"batch_size": 16, "epochs": 4, "learning_rate": 0.005, "seed": 1, "log_every": None},
        metrics=["accuracy", "f1"],
    )
    (place / "run.yaml").write_text(json.dumps(recipe))
    train_here(place / "run.yaml", place / "run", env={"AFINA_SCRATCH": str(place / "scratch")})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24-token texts (some are longer), and its reviews, in a folder that quoting has to survive."""
    place = tmp_path_factory.mktemp("it's a $(place)")
    (place / "scratch").mkdir()
    tiny.tiny_model(place / "model")
    rows = tiny.tiny_reviews(203, 7)
    for number, row in enumerate(rows):
        row["id"] = f"r{number}"
        row["text"] += " and more of the same" * (number % 11 == 5)
    tiny.write_csv(place / "reviews.csv", rows)
    train(place)
    return place


@pytest.fixture
def run(place: Path) -> Path:
    return place / "run"


@pytest.fixture
def reviews(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(place / "reviews.csv", tmp_path / "reviews.csv"))


def here(run: Path, inputs: str | Path, out: Path, **options: Any) -> dict[str, Any]:
    """What `afina predict` does, in this process."""
    about = planned(run, inputs, out, **options)
    if about["state"] != "whole":
        predict_parts.run(about["parts"], 0, 1, and_merge=True, progress="log")
    return about


def planned(run: Path, inputs: str | Path, out: Path, **options: Any) -> dict[str, Any]:
    """The plan stage of `here`: the inputs are checked, and the folder of parts is there."""
    return plan_parts.plan(predicting.compose(run, [inputs], out, PredictRequest(**options)))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


# -- the numbers ------------------------------------------------------------------------------------------------------


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
    assert summary["truncated"] > 10 and "were cut" in done.stderr
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


# -- killed and resumed -----------------------------------------------------------------------------------------------


def _large(reviews: Path, times: int) -> Path:
    lines = pa_csv.read_csv(reviews, parse_options=pa_csv.ParseOptions(newlines_in_values=True))
    data = reviews.with_name("large.parquet")
    pq.write_table(pa.concat_tables([lines] * times), data, row_group_size=777)
    return data


def test_killed_at_any_instant_the_output_is_the_same_file(run: Path, reviews: Path, tmp_path: Path) -> None:
    """SIGKILL to the worker, SIGINT to the command, then to the end."""
    data = _large(reviews, 20)
    folder = tmp_path / "outputs"
    folder.mkdir()
    whole, out = folder / "whole.parquet", folder / "killed.parquet"
    here(run, data, whole, chunk_rows=100)
    parts = folder_of(out)

    def until(count: int) -> None:
        for _ in range(6000):
            if len(list(parts.glob("part-*"))) >= count:
                return
            time.sleep(0.01)
        raise AssertionError("no part was made")

    about = planned(run, data, out, chunk_rows=100)
    assert about["chunks"] == 41
    killed = ForkedWorkers([sys.executable, "-m", "afina.worker", "predict", "run", str(parts)])
    until(2)
    killed.kill()
    killed.wait()
    there = len(list(parts.glob("part-*")))
    assert 2 <= there < 41
    command = [sys.executable, "-m", "afina.cli", "predict", str(run), str(data), "-o", str(out), "--chunk-rows", "100"]
    stopped = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until(there + 2)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, errors
    assert "afina: resuming: " in errors and "Continue with: afina predict" in errors and "Traceback" not in errors
    assert there + 2 <= len(list(parts.glob("part-*"))) < 41
    assert not out.exists()
    here(run, data, out, chunk_rows=100)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["killed.parquet", "whole.parquet"]


def test_shares_are_the_same_file_and_the_last_one_merges(run: Path, reviews: Path, tmp_path: Path) -> None:
    here(run, reviews, tmp_path / "whole.csv", chunk_rows=30)
    about = planned(run, reviews, tmp_path / "shared.csv", chunk_rows=30)
    merged = [predict_parts.run(about["parts"], k, 3, and_merge=True, progress="log")["merged"] for k in (2, 0, 1)]
    assert merged == [False, False, True]
    assert (tmp_path / "shared.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_merge_that_was_killed_is_repeated(run: Path, reviews: Path, tmp_path: Path) -> None:
    """The output has its name, the folder is still there; and a damaged part is made again."""
    out = tmp_path / "out.csv"
    about = planned(run, reviews, out, chunk_rows=50)
    predict_parts.run(about["parts"], 0, 1, and_merge=False, progress="log")
    part = Parts(about["parts"]).path(1)
    part.write_bytes(part.read_bytes()[:-9])
    assert planned(run, reviews, out, chunk_rows=50)["done"] == 4
    predict_parts.run(about["parts"], 0, 1, and_merge=False, progress="log")
    kept = shutil.copytree(about["parts"], tmp_path / "kept")
    predict_parts.merge(about["parts"])
    content = out.read_bytes()
    marker = {"file": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    kept.rename(about["parts"])
    (folder_of(out) / "merged.json").write_text(
        json.dumps({**marker, "summary": {"rows": 203, "blank": 0, "truncated": 0}})
    )
    assert here(run, reviews, out, chunk_rows=50)["state"] == "resumed"
    assert out.read_bytes() == content and not folder_of(out).exists()


def test_a_difference_is_refused_by_name(run: Path, reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    about = planned(run, reviews, out, chunk_rows=50)
    before = tree(Path(about["parts"]))
    with pytest.raises(InputError, match=r"chunk_rows was 50, is 60.*") as refused:
        planned(run, reviews, out, chunk_rows=60)
    assert "remove that folder" in refused.value.remedy
    other = Path(shutil.copy(reviews, tmp_path / "other.csv"))
    with pytest.raises(InputError, match=r"input other.csv was not there; input reviews.csv is not given"):
        planned(run, other, out, chunk_rows=50)
    another = shutil.copytree(run, tmp_path / "another run")
    weights = bytearray((another / "model/model.safetensors").read_bytes())
    weights[-5] ^= 1
    (another / "model/model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="the model is a different one"):
        planned(another, reviews, out, chunk_rows=50)
    text = reviews.read_text()
    reviews.write_text(text.replace("r7", "x7"))
    with pytest.raises(InputError, match=r"input reviews.csv has changed"):
        planned(run, reviews, out, chunk_rows=50)
    with pytest.raises(InputError, match=r"reviews.csv: its content differs"):
        predict_parts.run(about["parts"], 0, 1, and_merge=True, progress="log")
    assert tree(Path(about["parts"])) == before
    reviews.write_text(text)  # touched, and the same again
    here(run, reviews, out, chunk_rows=50)
    assert here(run, reviews, out, chunk_rows=50)["state"] == "whole"
    with pytest.raises(InputError, match=r"exists \(another prediction: keep was \"all\", is \"id\"\)"):
        here(run, reviews, out, chunk_rows=50, keep="id")
    (tmp_path / "mine.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="exists; nothing that exists is overwritten"):
        here(run, reviews, tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "a\n1\n"


# -- refused ----------------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[str, Callable[[Path], Any], dict[str, Any], str, str]] = {
    "no such column": ("a.csv", lambda p: p.write_text("texts,n\na,1\n"), {}, "no column `text`", "did you mean `texts`"),
    "other separator": ("a.csv", lambda p: p.write_text("text;n\na;1\n"), {}, "no column `text`", "separated by `;`: `data.delimiter"),
    "named column": ("a.csv", lambda p: p.write_text("text\na\n"), {"text": ["body"]}, "no column `body`", "--text"),
    "two columns": ("a.csv", lambda p: p.write_text("text,b\na,c\n"), {"text": ["text", "b"]}, "reads one text a row", "--text COLUMN"),
    "twice": ("a.csv", lambda p: p.write_text("text,n,text\na,1,2\n"), {}, "column `text` occurs twice", "rename"),
    "half a character": ("a.jsonl", lambda p: p.write_text('{"text": "a \\ud83d"}\n'), {}, "line 1: column `text` holds .ud83d", "cut in the middle"),
    "a column of the output": ("a.csv", lambda p: p.write_text("text,prediction\n" + "a,1\n" * 3000 + "ragged\n"), {}, "has a column `prediction`", "--keep id"),
    "an option of no use": ("a.jsonl", lambda p: p.write_text('{"text": "a"}'), {"reading": {"header": False}}, "--header: is for CSV and TSV files", "leave it out"),
    "a list": ("a.jsonl", lambda p: p.write_text('{"text": ["a"]}\n{"text": ["b", "c"]}\n'), {}, "line 1: column `text` holds a list, a text is expected", "--text"),
    "no Parquet": ("a.parquet", lambda p: p.write_bytes(b"PAR1 nonsense"), {}, "not a readable Parquet file", "write the file again"),
    "no rows": ("a.csv", lambda p: p.write_text("text\n"), {}, "no rows", "has rows"),
    "score taken": ("a.csv", lambda p: p.write_text("text,score: 3\na,b\n"), {}, "a column `score: 3`", "--keep id"),
    "unknown format": ("a.xlsx", lambda p: p.write_text("text"), {}, "format .xlsx is not known", ".csv"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_place_and_leaves_nothing(name: str, run: Path, tmp_path: Path) -> None:
    file, write, options, message, remedy = BAD[name]
    folder = tmp_path / "in put"
    folder.mkdir()
    write(folder / file)
    before = tree(folder)
    with pytest.raises(AfinaError, match=message) as refused:
        here(run, folder / file, folder / "out.parquet", **options)
    assert remedy in refused.value.remedy
    assert refused.value.exit_code == 2
    assert tree(folder) == before


def test_bad_bytes_in_parquet_are_found_before_the_model_is_loaded(run: Path, tmp_path: Path) -> None:
    good = pa.array([b"fine"] * 9000 + [b"\xff\xfe"] + [b"fine"] * 10, pa.binary())
    pq.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), len(good), good.buffers())}), tmp_path / "a.parquet"
    )
    with pytest.raises(AfinaError, match=r"a.parquet, row 9001: column `text` holds bytes that are not UTF-8"):
        plan_parts.plan(predicting.compose(run, [tmp_path / "a.parquet"], tmp_path / "o.parquet"))


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (["RUN", "missing.csv"], "missing.csv: no such file", "working directory"),
        (["RUN", "reviewz.csv"], "reviewz.csv: no such file", "did you mean `reviews.csv`?"),
        (["nowhere", "reviews.csv"], "nowhere: no such folder", "`afina list` names the runs"),
        (["model", "reviews.csv"], "is a BertModel, not a classifier", "train it first"),
        (["RUN", "reviews.csv", "-o", "reviews.csv"], "is an input", "another output"),
        (["RUN", "reviews.csv", "-o", "out.xlsx"], "format .xlsx is not known", ".jsonl"),
        (["RUN", "reviews.csv", "-o", "no/such/out.csv"], "there is no folder", "mkdir -p"),
        (["RUN", "-", "reviews.csv"], "standard input cannot be mixed", "alone"),
        (["RUN", "-"], "standard input is empty", "a text a line"),
        (["RUN", "reviews.csv", "--array", "3"], "--array is for a Slurm job", "--submit"),
        (["unfinished", "reviews.csv"], "this run has no model/ yet", "afina status"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_message_with_a_remedy(
    words: list[str],
    message: str,
    remedy: str,
    place: Path,
    reviews: Path,
    command: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unfinished = reviews.parent / "unfinished"
    shutil.copytree(place / "run", unfinished, ignore=shutil.ignore_patterns("model", "checkpoints"))
    (reviews.parent / "model").symlink_to(place / "model")
    before = tree(unfinished) | tree(reviews)
    monkeypatch.chdir(reviews.parent)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    done = command("predict", *(place / "run" if word == "RUN" else word for word in words))
    assert done.returncode == 2 and message in done.stderr and remedy in done.stderr, done
    assert tree(unfinished) | tree(reviews) == before
    assert not list(reviews.parent.glob("*.parts"))


def test_a_full_disk_keeps_what_is_done(
    run: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on file sizes, which merging is the first to meet."""
    out = tmp_path / "out.csv"
    about = planned(run, reviews, out, chunk_rows=20)
    predict_parts.run(about["parts"], 0, 1, and_merge=False, progress="log")
    before = tree(Path(about["parts"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
        code = door(["predict", "merge", about["parts"], "--json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    failure = json.loads(capsys.readouterr().out)["failure"]
    assert code == 3 and "File too large" in failure["message"] and "it resumes" in failure["remedy"]
    assert tree(Path(about["parts"])) == before and not out.exists()
    here(run, reviews, out, chunk_rows=20)
    assert len(rows_of_csv(out)) == 203


def rows_of_csv(path: Path) -> list[Any]:
    table: pa.Table = pa_csv.read_csv(path, parse_options=pa_csv.ParseOptions(newlines_in_values=True))
    return list(table.to_pylist())


# -- as Slurm jobs ----------------------------------------------------------------------------------------------------


def test_submitted_shares_are_one_prediction(
    run: Path, reviews: Path, tmp_path: Path, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script that sbatch was given is run as Slurm would run its tasks."""
    here(run, reviews, tmp_path / "whole.csv", chunk_rows=40)
    bin_dir = tmp_path / "bin"
    program(bin_dir, "sbatch", f'printf "%s\\0" "$@" >{json.dumps(str(tmp_path))}/argv; echo "4711;cluster"\n')
    program(bin_dir, "squeue", f"cat {json.dumps(str(tmp_path))}/queue\n")
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    out = tmp_path / "out 100%.csv"
    options = ["-o", out, "--chunk-rows", "40"]
    done = command(
        "predict", run, reviews, *options, "--submit", "--array", "2", "--time", "90", "--gpus-per-node", "0"
    )
    assert done.returncode == 0, done.stderr
    assert "submitted job 4711, 2 tasks: 203 rows in 6 chunks" in done.stdout
    argv = (tmp_path / "argv").read_text().split("\0")[:-1]
    parts = folder_of(out)
    assert argv[-3:] == [str(parts / "predict.sbatch"), str(parts), "2"]
    assert {"--array=0-1", "--time=90", "--nodes=1", "--job-name=predict-stars it's"} <= set(argv)
    assert f"--output={str(out).replace('%', '%%')}.slurm-%A_%a.out" in argv
    assert not any(word.startswith("--gpus") for word in argv)
    (tmp_path / "queue").write_text("4711_1|4711|PENDING|1:00|N/A||Resources\n4711_0|4712|COMPLETED|0:00|1|n1|None\n")
    refused = command("predict", run, reviews, *options)
    assert refused.returncode == 2 and "job 4711 is still working on this" in refused.stderr
    (tmp_path / "queue").write_text("")
    assert not predict_parts.run(str(parts), 1, 2, and_merge=True, progress="log")["merged"]
    env = {**os.environ, "SLURM_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "0"}
    ran = subprocess.run(["bash", *argv[-3:]], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "share 0 of 2 ended with 0" in ran.stdout
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    script = shutil.copy(ROOT / "slurm/predict.sbatch", tmp_path / "spooled")
    env["SLURM_JOB_ID"] = "9"
    late = subprocess.run(["bash", script, parts, "2"], env=env, capture_output=True, text=True, check=False)
    assert late.returncode == 0 and "the prediction is whole" in late.stdout


@pytest.mark.parametrize("made", [True, False])
def test_a_job_near_its_limit_goes_back_into_the_queue_if_it_made_a_part(
    made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch script with a worker that only waits, and USR1 as Slurm sends it."""
    program(tmp_path / "bin", "scontrol", f'echo "$@" >>{json.dumps(str(tmp_path))}/asked\nexit 1\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    parts = tmp_path / "out.csv.parts"
    parts.mkdir()
    (parts / "part-000000.parquet").touch()
    shutil.copy(ROOT / "slurm/job.sh", parts)
    body = f'touch "{parts}/part-00000{2 if made else 1}.parquet" "{tmp_path}/begun"; exec sleep 60\n'
    (parts / "worker.argv").write_bytes(b"bash\0-c\0" + body.encode() + b"\0worker\0")
    argv = ["bash", str(ROOT / "slurm/predict.sbatch"), str(parts), "2"]
    job = subprocess.Popen(argv, env={**os.environ, "SLURM_JOB_ID": "88"}, stdout=subprocess.PIPE, text=True)
    for _ in range(500):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=30)
    if made:
        assert (tmp_path / "asked").read_text() == "requeue 88\n"
        assert job.returncode == 75
    else:
        assert not (tmp_path / "asked").exists()
        assert "no part was made within the time limit" in output and job.returncode not in (0, 75)


def test_a_dry_run_is_what_is_done(run: Path, reviews: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    before = tree(tmp_path)
    done = command("predict", run, reviews, "-o", tmp_path / "o.csv", "--dry-run", "--submit", "--array", "2")
    assert done.returncode == 0, done.stderr
    shown, _, submission = done.stdout.partition("# would run\n")
    assert Prediction.model_validate_json(shown).out == tmp_path / "o.csv"
    assert submission.startswith("sbatch ") and "--array=0-1" in submission
    assert tree(tmp_path) == before
