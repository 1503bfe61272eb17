"""Trainings on several processes, sharded and whole, compared in one start of them.

Usage, with torchrun's variables: python -m tests.unit.training.sharded PROJECT OUT [CASES]: PROJECT as the fixture `project` writes it; rank 0 writes to OUT, for each
list of overrides in the JSON list CASES, the largest differences between the two trainings. Without CASES: for each architecture, those of
logits and gradients, or the reason why it is refused.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from afina.api import plan_for
from afina.run.allocation import Allocation
from afina.run.job_request import JobRequest
from afina.run.new_run import claim, prepare

_prepared: dict[str, Any] = {}


def trained(project: Path, place: Path, overrides: list[str], sharding: str) -> dict[str, Any]:
    """A training to its end in this process group; what it left, on rank 0."""
    from accelerate.state import AcceleratorState

    from afina.worker.compute import ranks
    from afina.worker.survival.lease import Lease
    from afina.worker.survival.stop import StopRequest
    from afina.worker.training.attempt import open_data
    from afina.worker.training.build import build_attempt
    from afina.worker.training.results.export_results import export_results
    from afina.worker.training.trainer import RunTrainer

    AcceleratorState._reset_state(reset_partial_state=True)
    words = [*overrides, f"train.sharding={sharding}"]
    run = None
    if ranks.rank() == 0:
        plan = plan_for(project / "recipe.yaml", JobRequest(overrides=words, num_processes=2, gpus_per_node=0))
        key = f"{plan.recipe.model} {plan.recipe.task} {plan.recipe.tokens.windows}"  # what else it depends on is the same
        if key not in _prepared:
            _prepared[key] = prepare(plan)
        run = claim(plan, _prepared[key], ["true"], "", place / f"{len(list(place.iterdir()))} {sharding}")
        run.begin_attempt("local-1")
    run = ranks.from_rank_zero(run)
    lease = Lease(run, "local-1")
    data = open_data(run.plan(), run.prepared(), verify=False)
    allocation = Allocation(attempt="local-1")
    built = build_attempt(run, allocation, run.plan().geometry, data, StopRequest(run), lease)
    trainer = RunTrainer(*built)
    trainer.train()
    trainer.attempt.saver.finish()
    held = sum(
        weight.to_local().numel() if sharding == "fsdp" else weight.numel() for weight in trainer.model.parameters()
    )
    everywhere = sum(ranks.everyone(held))
    results = export_results(trainer)
    if ranks.rank():
        return {}
    from safetensors.torch import load_file

    total = sum(p.numel() for p in trainer.model.parameters())
    weights = load_file(next(run.model.glob("*.safetensors")))
    return {
        "weights": {name: weight.float().numpy() for name, weight in weights.items()},
        "logits": trainer.logits.copy(),
        "lines": [json.loads(line) for line in run.metrics_file.read_text().splitlines()],
        "copies": everywhere / total,
        "metrics": results.metrics,
        "checkpoint": sorted(path.name for path in next(run.checkpoints.glob("step-*")).iterdir()),
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    assert one["weights"].keys() == other["weights"].keys()
    weights = max(float(np.abs(one["weights"][name] - other["weights"][name]).max()) for name in one["weights"])
    logits = float(np.abs(one["logits"] - other["logits"]).max())
    names = ("loss", "grad_norm", "eval_loss", "training_loss")
    pairs = [(a, b) for a, b in zip(one["lines"], other["lines"], strict=True)]
    logged = max(abs(a[name] - b[name]) for a, b in pairs for name in names if name in a)
    about = {"copies": [one["copies"], other["copies"]], "checkpoint": other["checkpoint"], "lines": len(pairs)}
    return {"weights": weights, "logits": logits, "logged": logged, **about}


def compared(folder: Path) -> str | float:
    """The largest difference between gradients (of their largest) and logits of a whole model and of a sharded one; or a refusal."""
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from afina.errors import RecipeError
    from afina.worker.compute import ranks
    from afina.worker.model.depth import blocks, check_sharding

    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
        check_sharding(model)
    except RecipeError as refused:
        return refused.message
    whole, parted = (AutoModelForSequenceClassification.from_pretrained(folder).eval() for _ in range(2))
    ranks.shard(parted, blocks(parted), torch.device("cpu"), bf16=False)
    draw = torch.Generator().manual_seed(ranks.rank())
    inputs = {"input_ids": torch.randint(5, 30, (3, 12), generator=draw), "attention_mask": torch.ones(3, 12).long()}
    worst = 0.0
    for _ in range(2):  # and once more after an evaluation
        one, other = (model(**inputs)["logits"] for model in (whole, parted))
        for logits in (one, other):
            logits.square().sum().backward()
        for (name, weight), shard in zip(whole.named_parameters(), parted.parameters(), strict=True):
            assert (weight.grad is None) == (shard.grad is None), name
            if weight.grad is not None:
                dist.all_reduce(weight.grad)
                gradient = weight.grad / ranks.count()
                worst = max(worst, float((gradient - shard.grad.full_tensor()).abs().max() / gradient.abs().max()))
        whole.zero_grad()
        parted.zero_grad()
        with torch.inference_mode():
            worst = max(worst, float((parted(**inputs)["logits"] - one).abs().max()), float((one - other).abs().max()))
    return worst


def architectures(place: Path, out: Path) -> None:
    from tests.architectures import ARCHITECTURES, architecture_folder

    from afina.worker.compute import ranks

    found = {}
    for kind in ARCHITECTURES:
        if ranks.rank() == 0:
            architecture_folder(place / kind, kind)
        ranks.barrier()
        found[kind] = compared(place / kind)
    if ranks.rank() == 0:
        out.write_text(json.dumps(found))


def main(words: list[str]) -> None:
    import torch.distributed as dist

    from afina.worker.compute import ranks

    warnings.simplefilter("ignore")
    project, out = map(Path, words[:2])
    dist.init_process_group("gloo")
    if not words[2:]:
        architectures(project, out)
        ranks.leave()
        return
    found, cases = [], json.loads(words[2])
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        for overrides in cases:
            pair = [trained(project, Path(place), overrides, sharding) for sharding in ("none", "fsdp")]
            found.append(difference(*pair) if ranks.rank() == 0 else {})
            if ranks.rank() == 0:
                out.write_text(json.dumps(found))
        ranks.barrier()
    ranks.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
