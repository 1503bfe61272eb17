"""Trainings whose model is sharded (FSDP2): the training of whole models, checkpoints for any number of processes, `model/`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tests.architectures import architecture_config, architecture_folder
from tests.common import some_of
from tests.unit.training import in_process
from tests.unit.training.in_process import attempt_here, ranks_here

from afina.api import plan_for
from afina.errors import RecipeError
from afina.run.directory import RunDir
from afina.run.job_request import JobRequest
from afina.run.new_run import claim, prepare

SHARDED = (
    "train.sharding=fsdp",
    "train.precision=fp32",
    "train.max_steps=40",
    "train.save_every=5",
    "train.evaluate=10",
)


def environment(project: Path) -> dict[str, str]:
    return {"AFINA_SCRATCH": str(project / "scratch"), "AFINA_RUNTIME": "none", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True)
def scratch(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_SCRATCH", str(project / "scratch"))


def claimed(project: Path, run: Path, *overrides: str) -> RunDir:
    words = [f"model={project / 'still'}", *SHARDED, *overrides]
    plan = plan_for(project / "recipe.yaml", JobRequest(overrides=words, num_processes=2, gpus_per_node=0))
    return claim(plan, prepare(plan), ["true"], "", run)


def launched(project: Path, run: RunDir, attempt: str, nodes: int, per_node: int, stop_at: int = 0) -> None:
    """One attempt on `nodes` nodes of this machine with `per_node` processes each; stopped after `stop_at` steps."""
    processes = nodes * per_node
    about: dict[str, Any] = {"num_processes": processes, "nodes": nodes, "code": 75 if stop_at else 0}
    about |= {"env": environment(project), "constants": {"afina.worker.survival.stop._CHECK_EVERY_S": 0.0}}
    with ThreadPoolExecutor(1) as thread:
        attempted = thread.submit(attempt_here, run.path, attempt, **about)
        while stop_at and not attempted.done():
            if len([line for line in run.lines("metrics.jsonl") if "loss" in line]) >= stop_at:
                run.stop_file.touch()
                break
            time.sleep(0.01)
        attempted.result(timeout=300)
    run.stop_file.unlink(missing_ok=True)
    outcome = run.outcome()
    assert outcome is not None and (outcome.attempt, outcome.world_size) == (attempt, processes)


def weights(run: RunDir) -> dict[str, Any]:
    return {name: weight.numpy() for name, weight in load_file(run.model / "model.safetensors").items()}


#: Overrides of trainings on two processes: none, and others on each day.
_OTHERS = [
    ["train.max_batch_per_device=2", "tokens.batching=longest", "train.eval_batch_size=1"],
    ["train.fast_dropout=false", "train.arguments={activation_checkpointing: true}"],
    ["adapter={rank: 4, dropout: 0.1, targets: all-linear}"],
    ["adapter={rank: 4, dora: true}"],
    ["train.precision=bf16"],
    ["model=llama"],
    ["model=modernbert"],
    ["train.arguments={optim: sgd, optim_args: momentum=0.9, max_grad_norm: 0}"],
    ["train.freeze=embeddings", "train.layer_decay=0.9", "train.arguments={optim: rmsprop}"],
    ["train.arguments={optim: adagrad}"],
    ["tokens={max_length: 16, windows: {stride: 8}}", "train.max_batch_per_device=2"],
    ["task=token-classification", "data.files={all: tags.conll}", "data.text=tokens", "data.label=ner_tags"],
]
CASES: list[list[str]] = [[], *some_of(_OTHERS, 6)]


@pytest.fixture(scope="module")
def differences(project: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each case, between the training of whole models and of a sharded one."""
    for kind in ("llama", "modernbert"):
        architecture_folder(project / kind, kind)
    out = tmp_path_factory.mktemp("sharded") / "differences.json"
    keys = ["train.precision=fp32", "train.max_steps=6", "train.save_every=3", "train.evaluate=3"]
    cases = [[*keys, *case] for case in CASES]
    found: list[dict[str, Any]] = on_two_processes(project, out, json.dumps(cases))
    return found


def on_two_processes(project: Path, out: Path, *cases: str) -> Any:
    """What `sharded.py` wrote."""
    log = out.with_suffix(".log")
    argv = ["tests.unit.training.sharded", str(project), str(out), *cases]
    assert ranks_here(argv, log, 2, env=environment(project)) == [0, 0], log.read_text()
    return json.loads(out.read_text())


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(case) or "default" for case in CASES])
def test_a_sharded_model_trains_as_whole_ones_do(differences: list[dict[str, Any]], number: int) -> None:
    """Weights of `model/`, logits, losses and gradient norms, and that each weight is held once; bit for bit in most cases."""
    found = differences[number]
    assert found["lines"] >= 8
    assert max(found["weights"], found["logits"], found["logged"]) < 2e-6
    assert found["copies"] == [2.0, 1.0]
    parts = [name for name in found["checkpoint"] if name.startswith("shard-")]
    assert [name[:11] for name in parts] == ["shard-00001", "shard-00002"]
    assert not [name for name in found["checkpoint"] if name.startswith(("model", "adapter"))]


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_architecture_has_the_gradients_of_whole_models_or_is_refused(project: Path, tmp_path: Path) -> None:
    found = on_two_processes(tmp_path, tmp_path / "found.json")
    refused = {kind for kind, result in found.items() if isinstance(result, str)}
    unnamed = {"albert", "flaubert", "funnel", "ibert", "mpnet", "squeezebert", "xlm", "xlnet"}
    apart = {"canine", "convbert", "fnet", "nystromformer", "yoso"}
    shared = {"bart", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"}
    assert refused == unnamed | apart | shared, found
    assert {kind: result for kind, result in found.items() if kind not in refused and result > 1e-6} == {}


def test_one_process_trains_all_of_it_and_its_shards_resume_exactly(build: Callable[..., Any], capsys: Any) -> None:
    keys = ("train.sharding=fsdp", "train.save_every=2", "train.keep_after=all", "train.fast_dropout=true")
    trainer = build({}, *keys)
    assert "shards nothing here: there is one process" in capsys.readouterr().out
    step = trainer.attempt.run.checkpoints / "step-2"
    assert {"shard-00001-model-00001-of-00001.safetensors", "optimizer.pt"} < {path.name for path in step.iterdir()}
    again = build({}, *keys, train=False)
    shutil.copytree(step, again.attempt.run.checkpoints / "step-2")
    again.train(resume_from_checkpoint=str(again.attempt.run.checkpoints / "step-2"))
    again.attempt.saver.finish()
    assert bool((in_process.weights(trainer) == in_process.weights(again)).all())
    plain = build({}, *keys[1:])
    assert bool((in_process.weights(trainer) == in_process.weights(plain)).all())


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.compile=true", "train.compile: true was not proven with `train.sharding`"),
        ("train.cuda_graphs=true", "train.cuda_graphs: true was not proven"),
        ("train.precision=fp16", "train.precision: 'fp16' was not proven"),
        ("train.arguments={optim: adafactor}", "'adafactor' was not proven"),
        ("train.arguments={ddp_bucket_cap_mb: 10}", "there is no DistributedDataParallel"),
        ("train.arguments={neftune_noise_alpha: 5}", "was not proven on shards"),
    ],
)
def test_what_was_not_proven_on_shards_is_refused_with_the_recipe(project: Path, override: str, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_for(project / "recipe.yaml", JobRequest(overrides=["train.sharding=fsdp", override], num_processes=1))
    assert reason in str(caught.value) and caught.value.remedy


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", None),
        ("modernbert", None),
        ("distilbert", None),
        ("llama", None),
        ("t5", "shared between modules"),
        ("mpnet", "names no blocks"),
        ("canine", "unequally often"),
    ],
)
def test_models_that_cannot_be_sharded_are_refused_with_the_reason(kind: str, reason: str | None) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from afina.worker.model.depth import blocks, check_sharding

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(architecture_config(kind))
    if reason is not None:
        with pytest.raises(RecipeError, match=reason):
            check_sharding(model)
        return
    check_sharding(model)
    assert len(blocks(model)) == 2


def test_whole_tensors_lie_in_files_that_are_gone(tmp_path: Path) -> None:
    import torch

    from afina.worker.survival import sharded_state

    tensors = {"a": torch.arange(6.0).view(2, 3), "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.empty(0)}
    found = sharded_state.whole(tensors, tmp_path / "trainer", keep=True)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert not list((tmp_path / "trainer").iterdir())
    assert sharded_state.whole(tensors, tmp_path / "trainer", keep=False) == {}


@pytest.mark.series
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_resumes_on_two_nodes_of_two_processes_on_two_processes_and_on_two_nodes_again(
    project: Path, tmp_path: Path
) -> None:
    """Without dropout, whose masks depend on the number of processes."""
    whole, moved = (claimed(project, tmp_path / name) for name in ("whole", "moved"))
    launched(project, whole, "local-1", 1, 2)
    launched(project, moved, "local-1", 2, 2, stop_at=12)
    files = sorted(path.name for path in max(moved.checkpoints.glob("step-*"), key=lambda p: int(p.name[5:])).iterdir())
    assert [name[:11] for name in files if name.startswith("shard-")] == [f"shard-0000{n}" for n in (1, 2, 3, 4)]
    launched(project, moved, "local-2", 1, 2, stop_at=24)
    launched(project, moved, "local-3", 2, 2)
    expected, found = weights(whole), weights(moved)
    assert expected.keys() == found.keys()
    assert max(float(np.abs(expected[name] - found[name]).max()) for name in expected) < 1e-5
    assert [line["step"] for line in whole.metrics()] == [line["step"] for line in moved.metrics()]
