"""Runs that do not train all weights alike: with a LoRA adapter, with frozen layers, with rates by depth. Frozen weights stay, checkpoints resume
exactly, and `model/` of an adapter has the run's logits everywhere.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from afina.api import plan_for
from afina.errors import AfinaError
from afina.prediction.request import find_model
from afina.run.job_request import JobRequest
from afina.run.outcome import Outcome

ADAPTER = "adapter={rank: 4, dropout: 0.1, targets: all-linear}"
#: Without afina: the logits of texts by peft and by Transformers, and the labels of a pipeline.
PLAIN = """
import json, sys
import numpy as np, torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, merged, texts = sys.argv[1], sys.argv[2], json.load(sys.stdin)
assert not [name for name in sys.modules if name.startswith("afina")]
tokenizer = AutoTokenizer.from_pretrained(folder)
named = AutoModelForSequenceClassification.from_pretrained(folder, config=AutoConfig.from_pretrained(folder + "/classifier"))
models = [
    AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=named.config.num_labels),
    named,
    AutoModelForSequenceClassification.from_pretrained(merged),
]
with torch.inference_mode():
    logits = [[model.eval()(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in texts] for model in models]
classify = pipeline("text-classification", model=named, tokenizer=tokenizer)
again = pipeline("text-classification", model=merged)
labels = [[row["label"] for row in one(texts)] for one in (classify, again)]
print(json.dumps({"logits": logits, "labels": labels}))
"""


def test_the_model_folder_has_the_logits_of_the_run_in_plain_peft_and_merged(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    from afina.worker.inference.classifier import Classifier
    from afina.worker.inference.model_folder import export
    from afina.worker.training.results.export_results import export_results

    trainer = build({}, ADAPTER, "train.learning_rate=0.05")
    attempt, run = trainer.attempt, trainer.attempt.run
    results = export_results(trainer)
    trained, total = attempt.parameters
    about = {"task": attempt.data.task, "labels": attempt.data.labels, "model_step": results.model_step}
    counts = {"parameters": total, "trained_parameters": trained, "metrics": results.metrics}
    run.record(Outcome(outcome="finished", exit_code=0, attempt="local-1", global_step=4, **about, **counts))
    table = pq.read_table(run.predictions).to_pydict()
    classifier = Classifier(find_model(run.path)[1])
    assert classifier.batching == "packed" and classifier.labels == attempt.data.labels
    logits = classifier.logits(table["text"])
    assert np.abs(logits - trainer.logits).max() <= 1e-5
    assert [row["prediction"] for row in classifier.predict(table["text"])] == table["prediction"]

    adapter, merged = tmp_path / "stars", tmp_path / "merged"
    export(str(run.path), str(adapter), False)
    made = export(str(run.path), str(merged), True, merge=True)
    assert made["onnx_difference"] <= 1e-4 and made["parameters"] == total
    assert not list(merged.glob("adapter*")) and (merged / "model.safetensors").is_file()
    card = (adapter / "README.md").read_text()
    assert (
        "library_name: peft" in card and f"{trained:,} of {total:,} parameters" in card and "adapters of rank 4" in card
    )
    assert "library_name: transformers" in (merged / "README.md").read_text()
    for folder in (adapter, merged):
        assert np.abs(Classifier(folder).logits(table["text"]) - logits).max() <= 1e-5
    argv = [sys.executable, "-c", PLAIN, str(adapter), str(merged)]
    done = subprocess.run(argv, input=json.dumps(table["text"]), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    for each in theirs["logits"]:
        assert np.abs(np.array(each) - logits).max() <= 1e-5
    assert theirs["labels"] == [table["prediction"]] * 2


ADAPTED, FOUR_BITS = (ADAPTER, "train.base_dtype=bf16"), (ADAPTER, "train.base_dtype=nf4")
LAYERS = ("train.freeze=1", "train.layer_decay=0.5", "train.head_learning_rate=0.01")


@pytest.mark.parametrize(
    ("keys", "optim", "moments"),
    [
        ((), None, 8),
        (("train.freeze=embeddings",), None, 8),
        (("train.freeze=body",), "adafactor", 0.03),
        ((ADAPTER,), "rmsprop", 4),
        (ADAPTED, "sgd", 0),
        (FOUR_BITS, None, 8),
        (("train.sharding=fsdp",), None, 8),
    ],
)
def test_the_prepare_stage_knows_the_sizes_of_a_training(
    build: Callable[..., Any], keys: tuple[str, ...], optim: str | None, moments: float
) -> None:
    """Before any weight is loaded, and as a checkpoint is on the disk."""
    trainer = build({"optim": optim} if optim else {}, *keys, "train.save_every=2", "train.keep_after=all")
    attempt = trainer.attempt
    assert attempt.run.prepared()["sizes"] == dataclasses.asdict(attempt.sizes)
    trained, total = attempt.parameters
    saved = 4 * (trained if ADAPTER in keys else total)
    assert (attempt.sizes.weights, attempt.sizes.exported) == (4 * total, saved)
    assert attempt.sizes.checkpoint == pytest.approx(saved + moments * trained, abs=0.02 * trained)
    event = next(e for e in attempt.run.lines("events.jsonl") if e.get("event") == "checkpoint")
    assert 0 < event["bytes"] - attempt.sizes.checkpoint < 60_000, "the states of a rank, and the manifest"
    stored = sum(p.nbytes for p in trainer.model.parameters())
    if keys == FOUR_BITS:
        stored += sum(sum(t.nbytes for t in (s.absmax, s.state2.absmax)) for s in _scales(trainer.model))
    assert attempt.sizes.state == pytest.approx(stored + (4 + moments) * trained, rel=0.02)


def _scales(model: Any) -> list[Any]:
    """Those of the weights in 4 bits."""
    return [state for p in model.parameters() if (state := getattr(p, "quant_state", None)) is not None]


@pytest.mark.parametrize(
    "keys", [ADAPTED, FOUR_BITS, LAYERS], ids=["adapter, bf16 base", "adapter, base in 4 bits", "layers"]
)
def test_only_what_is_trained_changes_and_a_checkpoint_resumes_exactly(
    build: Callable[..., Any], keys: tuple[str, ...]
) -> None:
    trainer = build({}, *keys, "train.save_every=2", "train.keep_after=all")
    before = build({}, *keys, train=False)
    started = {name: weight.detach().clone() for name, weight in before.model.named_parameters()}
    for name, weight in trainer.model.named_parameters():
        assert bool((weight != started[name]).any()) == weight.requires_grad, name
    step = trainer.attempt.run.checkpoints / "step-2"
    files = {path.name for path in step.iterdir()}
    assert ({"adapter_model.safetensors", "adapter_config.json"} < files) == (keys != LAYERS)
    assert ("model.safetensors" in files) == (keys == LAYERS)
    event = next(e for e in trainer.attempt.run.lines("events.jsonl") if e.get("event") == "checkpoint")
    assert event["bytes"] == sum(path.stat().st_size for path in step.iterdir())
    shutil.copytree(step, before.attempt.run.checkpoints / "step-2")
    before.train(resume_from_checkpoint=str(before.attempt.run.checkpoints / "step-2"))
    before.attempt.saver.finish()
    for (name, one), (_, other) in zip(trainer.model.named_parameters(), before.model.named_parameters(), strict=True):
        assert bool((one == other).all()), name


def test_each_layer_moves_at_its_rate(build: Callable[..., Any]) -> None:
    """One step of SGD on the same gradients as without these keys."""
    arguments = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    one = ("train.max_steps=1", "train.learning_rate=0.1", "train.precision=fp32")
    start = {
        name: weight.detach().clone() for name, weight in build(arguments, *one, train=False).model.named_parameters()
    }
    plain, rated = (build(arguments, *one, *keys) for keys in ((), LAYERS[1:]))
    assert [line["learning_rate"] for line in rated.attempt.run.lines("metrics.jsonl") if "loss" in line] == [0.1]
    expected = {
        "bert.embeddings": 0.125,
        "bert.encoder.layer.0": 0.25,
        "bert.encoder.layer.1": 0.5,
        "bert.pooler": 1,
        "classifier": 0.1,
    }
    of_plain, of_rated = (dict(trainer.model.named_parameters()) for trainer in (plain, rated))
    for name, before in start.items():
        factor = next(value for path, value in expected.items() if name.startswith(path))
        moved, by_rate = of_plain[name] - before, of_rated[name] - before
        assert bool(((by_rate - factor * moved).abs() <= 1e-6 + 1e-3 * moved.abs().max()).all()), name


@pytest.mark.parametrize("missing", ["kind: qlora", "rank: 0", "targets: []", "ranks: 4"])
def test_a_wrong_section_is_refused(project: Path, missing: str) -> None:
    with pytest.raises(AfinaError, match="adapter"):
        plan_for(project / "recipe.yaml", JobRequest(overrides=[f"adapter={{{missing}}}"]))


def test_a_run_goes_on_from_an_adapter(build: Callable[..., Any], project: Path, tmp_path: Path) -> None:
    """With the same labels from the same logits; with others from the same adapter. Both write an adapter beside the same base."""
    from afina.worker.inference.classifier import Classifier
    from afina.worker.training.results.export_results import export_results

    first = build({}, "adapter={rank: 4, alpha: 8, targets: all-linear}", "train.learning_rate=0.05")
    export_results(first)
    folder = first.attempt.run.model.rename(tmp_path / "first stars")
    given = (f"model={folder}", "adapter={dropout: 0.2}")
    second = build({}, *given, train=False)
    adapter = second.attempt.plan.recipe.adapter
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (4, 8, 0.2)
    for (name, one), (_, other) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert bool((one == other).all()), name
        assert one.requires_grad == other.requires_grad
    second = build({}, *given, "train.learning_rate=0.05")
    export_results(second)
    assert json.loads((second.attempt.run.model / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        project / "model"
    )
    table = pq.read_table(second.attempt.run.predictions).to_pydict()
    assert np.abs(Classifier(second.attempt.run.model).logits(table["text"]) - second.logits).max() <= 1e-5
    assert np.abs(Classifier(folder).logits(table["text"]) - second.logits).max() > 1e-3

    one_output = shutil.copytree(folder, tmp_path / "regression")
    scores = build({}, f"model={one_output}", "adapter={}", "task=regression", train=False)
    before = dict(first.model.named_parameters())
    for name, weight in scores.model.named_parameters():
        if not name.startswith("classifier."):
            assert bool((weight == before[name]).all()), name


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, "holds an adapter, and the recipe trains all weights"),
        ("{rank: 8}", "adapter.rank: the adapter in .* has 4"),
        ("{targets: [query]}", "adapter.targets"),
        ("{dora: true}", "adapter.dora"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_before_the_queue(
    project: Path, section: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFINA_SCRATCH", str(project / "scratch"))
    folder = project / "adapter"
    (folder / "classifier").mkdir(parents=True, exist_ok=True)
    shutil.copy(project / "model/config.json", folder / "classifier")
    about = {"base_model_name_or_path": str(project / "model"), "r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps({**about, "target_modules": ["query", "value"]}))
    words = [f"model={folder}", *([f"adapter={section}"] if section else [])]
    with pytest.raises(AfinaError, match=message):
        plan_for(project / "recipe.yaml", JobRequest(overrides=words))
