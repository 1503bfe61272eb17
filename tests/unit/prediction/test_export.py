"""What is given away: the exported folder, its card, its ONNX; and the model in Python's hands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests import tiny
from tests.unit.conftest import Ran, tree

import afina
from afina.errors import EnvironmentProblem, InputError
from afina.recipe.keys.train_keys import Tokens
from afina.run.directory import RunDir
from afina.statistics.decision_rule import FILE, DecisionRule
from afina.worker.inference import model_folder as worker
from afina.worker.inference.classifier import Classifier
from afina.worker.inference.model_card import facts_of, model_card
from afina.worker.inference.onnx_export import export_onnx


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run as training leaves it, made by hand: a tiny classifier, its predictions, its record."""
    place = tmp_path_factory.mktemp("it's a $(place)")
    run = place / "run"
    (run / "attempts/local-1").mkdir(parents=True)
    labels = ["1 star", "2 | stars", "3 stars"]
    tiny.tiny_model(run / "model", num_labels=3)
    config = json.loads((run / "model/config.json").read_text())
    config |= {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    (run / "model/config.json").write_text(json.dumps(config))
    recipe = {
        "name": "stars",
        "model": "owner/base",
        "revision": "main",
        "data": {"hub": "owner/reviews", "config": "en", "text": "body", "label": "stars"},
        "tokens": {"max_length": 40},
        "train": {"batch_size": 8, "epochs": 2, "arguments": {"weight_decay": 0.01}},
    }
    site = {"scratch": str(place)}
    geometry = {"nodes": 1, "processes_per_node": 1, "gpus_per_node": 0, "cpus_per_process": 1}
    geometry |= {"global_batch": 8, "batch_per_device": 8, "accumulation": 1}
    plan = {"afina_version": "0.1.0", "recipe": recipe, "site": site, "geometry": geometry}
    prepared = {
        "task": "single-label",
        "labels": labels,
        "rows": {"train": 90, "eval": 60},
        "tokens": {"train": 900, "eval": 600},
    }
    prepared |= {"model_commit": "a" * 40, "data_commit": "b" * 40, "digest": "c" * 64}
    metrics = {"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_f1": 0.7, "eval_f1_per_class": [0.5, 0.6, 1.0]}
    outcome = {"outcome": "finished", "exit_code": 0, "attempt": "local-1", "global_step": 24, "metrics": metrics}
    outcome |= {"task": "single-label", "labels": labels, "model_step": 12, "device": "cpu", "world_size": 1}
    record = {"git": {"commit": "d" * 40, "diff_sha256": "e" * 64}, "image": {"sha256": "f" * 64}}
    for name, value in {"plan": plan, "prepared": prepared, "outcome": outcome, "record": record}.items():
        (run / f"{name}.json").write_text(json.dumps(value))
    (run / "attempts/local-1/env.json").write_text(json.dumps({"afina": "0.1.0", "python": "3.11.7"}))
    rows = tiny.tiny_reviews(60, 2, stars=3)
    truth = [labels[row["stars"] - 1] for row in rows]
    predicted = [labels[0] if i % 4 == 0 else name for i, name in enumerate(truth)]
    scores = {f"score: {name}": [0.8 if name == chosen else 0.1 for chosen in predicted] for name in labels}
    table = {"text": [row["text"] for row in rows], "label": truth, "prediction": predicted, **scores}
    pq.write_table(pa.table(table), run / "predictions.parquet")
    return place


def test_transformers_loads_the_folder_with_its_labels(
    place: Path, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    from transformers import pipeline

    out = tmp_path / "stars it's"
    done = command("export", place / "run", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] > 10_000
    files = "README.md afina.json config.json model.safetensors tokenizer.json tokenizer_config.json"
    assert sorted(p.name for p in out.iterdir()) == files.split()
    texts = [row["text"] for row in tiny.tiny_reviews(30, 9)] + ["great " * 60]
    classify = pipeline("text-classification", model=str(out), top_k=None)
    model = afina.load(place / "run")
    for theirs, mine in zip(classify(texts, truncation=True), model.predict(texts), strict=True):
        assert theirs[0]["label"] == mine["prediction"]
        assert {t["label"]: t["score"] for t in theirs} == pytest.approx(mine["scores"], abs=1e-5)
    exported = afina.load(out)
    assert (exported.text_columns, exported.tokens.max_length) == (("body",), 40)
    assert np.array_equal(exported.predict_proba(texts), model.predict_proba(texts))
    before = tree(out)
    again = command("export", place / "run", "-o", out)
    assert again.returncode == 2 and "nothing that exists is overwritten" in again.stderr
    assert tree(out) == before


def test_a_folder_cuts_long_texts_as_its_run(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    plan = json.loads((run / "plan.json").read_text())
    plan["recipe"]["tokens"]["truncation"] = "head+tail"
    (run / "plan.json").write_text(json.dumps(plan))
    worker.export(str(run), str(tmp_path / "out"), onnx=False)
    card = (tmp_path / "out/README.md").read_text()
    assert "cut to their first 10 and last 30 tokens in training; `truncation=True` keeps their beginning alone" in card
    texts = pa.array([f"great {'fine ' * 50} {end}" for end in ("bad", "good")], pa.large_string())
    for folder in (run, tmp_path / "out"):
        encoded = afina.load(folder).encode([texts])
        one, other = encoded.split.tokens.reshape(2, 40)
        assert encoded.truncated == 2 and (one[:10] == other[:10]).all() and (one[10:] != other[10:]).any()


def test_fitted_decisions_are_given_away_with_the_model(place: Path, tmp_path: Path) -> None:
    run, labels = tmp_path / "run", ["1 star", "2 | stars", "3 stars"]
    shutil.copytree(place / "run", run)
    (run / "model" / FILE).write_text(DecisionRule(3.0).to_json("single-label", labels, "0"))
    outcome = json.loads((run / "outcome.json").read_text())
    loss = {
        "metric": "log_loss", "first": 0.9, "second": 0.7, "low": -0.3, "high": -0.1, "p": 0.001,
        "test": "paired bootstrap",
    }  # fmt: skip
    record = {"temperature": 3.0, "measured_on": "test", "calibration_error": [0.2, 0.05], "differences": [loss]}
    (run / "outcome.json").write_text(json.dumps({**outcome, "decisions": record}))
    worker.export(str(run), str(tmp_path / "out"), onnx=False)
    card = (tmp_path / "out/README.md").read_text()
    words = "Temperature 3, fitted on eval; on test: expected calibration error 0.2000 without, 0.0500 with; log_loss 0.9000 without, 0.7000 with"
    assert card.count(words) == 2 and "`afina predict` and `afina.load` use it" in card, "how to use it, and methods"
    texts = [row["text"] for row in tiny.tiny_reviews(5, 9)]
    fitted, plain = (afina.load(tmp_path / "out", plain=plain).predict_proba(texts) for plain in (False, True))
    assert fitted.max() < plain.max() and np.array_equal(fitted, afina.load(run).predict_proba(texts))


def test_a_folder_reads_windows_as_its_run(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    plan = json.loads((run / "plan.json").read_text())
    plan["recipe"]["tokens"]["windows"] = {"stride": 8, "pool": "max", "max_windows": 3}
    (run / "plan.json").write_text(json.dumps(plan))
    worker.export(str(run), str(tmp_path / "out"), onnx=False)
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "max_length=40, stride=8, return_overflowing_tokens=True)`, at most 3." in card
        and "the largest of each label" in card
    )
    texts = [f"great {'fine ' * 20 * n} bad" for n in range(6)]
    model, exported = afina.load(run), afina.load(tmp_path / "out")
    assert np.array_equal(exported.predict_proba(texts), model.predict_proba(texts))
    # As the card says, by hand.
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text, logits in zip(texts, exported.logits(texts), strict=True):
        named = {"truncation": True, "max_length": 40, "stride": 8, "return_overflowing_tokens": True}
        windows = tokenizer(text, padding=True, return_tensors="pt", **named)
        each = plain(windows["input_ids"][:3], attention_mask=windows["attention_mask"][:3]).logits
        assert np.abs(each.amax(0).detach().numpy() - logits).max() < 1e-5


def test_the_card_is_what_the_hub_reads_and_what_the_run_says(place: Path) -> None:
    from huggingface_hub import ModelCard
    from sklearn.metrics import f1_score

    run = RunDir(place / "run")
    outcome = run.outcome()
    assert outcome is not None
    text = model_card(facts_of(run, outcome))
    card = ModelCard(text)
    about = card.data.to_dict()
    assert about["base_model"] == "owner/base" and about["datasets"] == ["owner/reviews"]
    assert (about["library_name"], about["pipeline_tag"]) == ("transformers", "text-classification")
    assert about["metrics"] == ["accuracy", "f1"]
    results = {r.metric_type: (r.metric_value, r.dataset_type, r.dataset_split) for r in card.data.eval_results}
    assert results == {"accuracy": (0.75, "owner/reviews", "eval"), "f1": (0.7, "owner/reviews", "eval")}
    table = pq.read_table(run.predictions).to_pydict()
    labels = outcome.labels or []
    each = f1_score(table["label"], table["prediction"], labels=labels, average=None)
    for name, score in zip(labels, each, strict=True):
        row = next(line for line in text.splitlines() if line.startswith(f"| {name.replace('|', chr(92) + '|')} |"))
        assert f" {score:.3f} " in row
    commit = "`" + "d" * 40 + ", with changes that were not committed`"
    for fact in (commit, "f" * 64, "`weight_decay` | 0.01", "24; the weights"):
        assert fact in text, fact
    assert "We fine-tuned owner/base (revision aaaa" in text and "on owner/reviews (en) (revision bbbb" in text
    assert text.count("✎ *To be written by the author:*") == 3
    assert str(place) not in text


def test_the_card_warns_beside_its_numbers(place: Path, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(place / "run", tmp_path / "run"))
    shared = "3 of 60 rows of eval are in train too, as the model reads them: owner/reviews/test, row 1"
    about = {**run.prepared(), "spoiled": {"eval": [shared], "test": ["of a split without numbers"]}}
    (run.path / "prepared.json").write_text(json.dumps(about))
    outcome = run.outcome()
    assert outcome is not None
    constant = "the model gives every text the label '1 star'"
    text = model_card(facts_of(run, outcome.model_copy(update={"warnings": [constant, shared]})))
    section = text[text.index("## How well it does") : text.index("## How it was trained")]
    assert section.count(f"**Warning:** {shared}\n") == section.count(f"**Warning:** {constant}\n") == 1
    assert "of a split without" not in text
    assert "Warning" not in model_card(facts_of(RunDir(place / "run"), outcome))


def test_an_unfinished_run_or_a_damaged_model_is_refused(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    out = tmp_path / "out"
    weights = (run / "model/model.safetensors").read_bytes()
    (run / "model/model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        worker.export(str(run), str(out), False)
    (run / "model/model.safetensors").write_bytes(weights)
    outcome = json.loads((run / "outcome.json").read_text())
    (run / "outcome.json").write_text(json.dumps(outcome | {"outcome": "stopped", "exit_code": 75}))
    with pytest.raises(InputError, match="nothing to export: it is stopped") as refused:
        worker.export(str(run), str(out), False)
    assert "afina resume" in refused.value.remedy
    with pytest.raises(InputError, match="is a model folder already"):
        afina.export(tiny.tiny_model(tmp_path / "plain", num_labels=2), out)
    assert sorted(p.name for p in tmp_path.iterdir() if "run" in p.name or "out" in p.name) == ["run"]


def test_without_the_extra_onnx_is_refused_before_anything_is_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(EnvironmentProblem, match="--onnx: onnxruntime is not installed") as refused:
        worker.export(str(place / "run"), str(tmp_path / "out"), True)
    assert ".[onnx]" in refused.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_onnx_is_the_same_model_or_is_not_published(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    answer = worker.export(str(place / "run"), str(tmp_path / "out"), True)
    assert answer["onnx_difference"] <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "out/onnx/model.onnx"), providers=["CPUExecutionProvider"])
    model = afina.load(tmp_path / "out")
    texts = [row["text"] for row in tiny.tiny_reviews(5, 4)]
    inputs = model.tokenizer(texts, padding=True, return_tensors="np")
    logits = session.run(["logits"], {i.name: inputs[i.name] for i in session.get_inputs()})[0]
    assert np.abs(logits - model.logits(texts)).max() < 1e-4
    # Windows, as the card of such a run says: the model gives logits for each.
    model = Classifier(tmp_path / "out", tokens=Tokens.model_validate({"max_length": 40, "windows": {"stride": 8}}))
    named = {"truncation": True, "max_length": 40, "stride": 8, "return_overflowing_tokens": True}
    inputs = model.tokenizer(long := "good fine " * 50, padding=True, return_tensors="np", **named)
    logits = session.run(["logits"], {i.name: inputs[i.name] for i in session.get_inputs()})[0]
    assert len(logits) > 2 and np.abs(logits.mean(0) - model.logits([long])[0]).max() < 1e-5
    assert "onnx/model.onnx" in (tmp_path / "out/README.md").read_text()
    # A token classifier has logits for each token.
    assert export_onnx(tiny.tiny_tagger(tmp_path / "tags"), tmp_path / "tags.onnx", texts * 6, 40) < 1e-4
    # Other weights than those that are compared with.
    from afina.errors import TrainingError
    from afina.worker.inference import onnx_export

    monkeypatch.setattr(onnx_export, "_write", lambda *_: None)
    other = tiny.tiny_model(tmp_path / "other", num_labels=3, seed=5)
    with pytest.raises(TrainingError, match="logits differ from PyTorch's"):
        export_onnx(other, tmp_path / "out/onnx/model.onnx", texts * 6, 40)


def test_a_model_in_python(place: Path) -> None:
    model = afina.load(place / "run/model")  # a run's model/ is the run
    assert model.labels == ["1 star", "2 | stars", "3 stars"]
    assert (model.task, model.tokens.max_length, model.text_columns) == ("single-label", 40, ("body",))
    assert model.batching == "packed" and "packed" in repr(model)
    texts = [row["text"] for row in tiny.tiny_reviews(300, 6)]
    scores = model.predict_proba(texts)
    assert scores.dtype == np.float32 and scores.shape == (300, 3)
    assert scores.sum(-1) == pytest.approx(np.ones(300), abs=1e-5)
    order = np.random.default_rng(0).permutation(300)
    assert model.predict_proba([texts[i] for i in order]) == pytest.approx(scores[order], abs=1e-6), (
        "not in input order"
    )
    small = afina.load(place / "run", batch_size=4, max_tokens=50)
    assert small.predict_proba(texts) == pytest.approx(scores, abs=1e-6)
    rows = model.predict([texts[0], "", None, " \n"])
    assert rows[0]["prediction"] == model.labels[int(scores[0].argmax())]
    assert rows[0]["scores"] == pytest.approx(dict(zip(model.labels, scores[0].tolist(), strict=True)))
    assert [one["prediction"] for one in rows[1:]] == [None] * 3
    assert np.isnan(model.predict_proba([""])).all()
    assert model.predict([]) == [] and model.predict_proba([]).shape == (0, 3)
    with pytest.raises(InputError, match=r"reads a text a row \(in training: body\), 2 were given"):
        model.predict([(texts[0], texts[1])])
    with pytest.raises(InputError, match="not Unicode"):
        model.predict(["\ud800"])
    of_pairs = Classifier(place / "run/model", text_columns=("premise", "hypothesis"))
    pairs = of_pairs.predict_proba([(texts[0], texts[1]), (texts[2], "")])
    assert np.isfinite(pairs[0]).all() and np.isnan(pairs[1]).all()
    with pytest.raises(InputError, match=r"reads 2 texts a row \(in training: premise, hypothesis\), 1 was given"):
        of_pairs.predict([texts[0]])
    with pytest.raises(InputError, match="a list of texts is expected"):
        model.predict("one text")
    with pytest.raises(InputError, match="mixed"):
        of_pairs.predict(["one", ("two", "three")])


def test_architectures_that_are_not_proven_are_padded(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny.tiny_model(tmp_path / "model", num_labels=2)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    size = len(AutoTokenizer.from_pretrained(folder))
    shape["embedding_size"] = 16
    config = AutoConfig.for_model("albert", vocab_size=size, num_labels=2, pad_token_id=0, **shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    model = afina.load(folder)
    assert model.batching == "grouped"
    texts = [row["text"] for row in tiny.tiny_reviews(50, 8)]
    with torch.inference_mode():
        one_by_one = [model.model(**model.tokenizer(t, return_tensors="pt")).logits[0].numpy() for t in texts]
    assert model.logits(texts) == pytest.approx(np.array(one_by_one), abs=1e-5)


def test_an_encoder_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no weights for classifier"):
        afina.load(tiny.tiny_model(tmp_path / "model"))
    with pytest.raises(InputError, match="modl: no such folder") as refused:
        afina.load(tmp_path / "modl")
    assert refused.value.remedy == "did you mean `model`?"
