"""Random combinations of training options: each is refused before a run, or trains to the end; packed and padded losses are equal, and
those of one and two processes.

`AFINA_TEST_SEED` draws others than those of the test suite.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.common import some_of
from tests.unit.training.in_process import lines, train_here

from afina.api import plan_for
from afina.errors import InputError
from afina.run.job_request import JobRequest
from afina.worker.model.check_arguments import check_arguments
from afina.worker.training.results.export_results import export_results

pytestmark = [pytest.mark.series, pytest.mark.filterwarnings("ignore")]

SEED = int(os.environ.get("AFINA_TEST_SEED", "20"))
DRAWS = 30
#: Draws on one and on two processes.
PAIRS = 8
#: Recipe keys and what they may be; None leaves one out.
KEYS: dict[str, tuple[Any, ...]] = {
    "tokens.batching": ("auto", "auto", "packed", "grouped", "longest", "padded"),
    "data.weight": (None, None, "weight"),
    "train.batch_size": (8, 7, 1, 64),
    "train.max_batch_per_device": (None, None, 1, 2, 3),
    "train.eval_batch_size": (None, 1, 5),
    "train.max_steps": (None, 1, 5),
    "train.epochs": (None, 1, 1.5),
    "train.evaluate": ("epoch", 1, 3, 1000),
    "train.save_every": ("epoch", 1, 2, 1000),
    "train.log_every": (1, 1, 3),
    "train.keep": ("best", "last"),
    "train.keep_after": ("best", "none", "all"),
    "train.keep_checkpoints": (1, 2),
    "train.best_metric": (None, "f1", "log_loss", "auroc", "mcc"),
    "train.loss": (None, None, "focal"),
    "train.focal_gamma": (None, None, 0, 0.5),
    "train.class_weights": (None, None, "balanced", {"1": 3, "5": 0}),
    "train.label_smoothing": (0, 0, 0.1),
    "train.fast_dropout": (True, False),
    "train.attention_dropout": (None, None, 0),
    "train.precision": ("auto", "fp32", "bf16"),
}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "optim": (None, None, "adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad"),
    "optim_args": (None, None, None, "momentum=0.9"),
    "weight_decay": (None, 0.1),
    "adam_beta2": (None, None, 0.9),
    "lr_scheduler_type": (None, "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "reduce_lr_on_plateau", "warmup_stable_decay"),
    "lr_scheduler_kwargs": (None, None, None, {"num_decay_steps": 2}),
    "warmup_steps": (None, 0, 2, 0.3, 50),
    "max_grad_norm": (None, 0, 0.1),
    "neftune_noise_alpha": (None, None, None, 5),
    "gradient_checkpointing": (None, None, True),
    "logging_first_step": (None, True),
}  # fmt: skip
#: Only what does not change the loss of the first step on the model without dropout.
SAME = ("data.weight", "train.batch_size", "train.max_batch_per_device", "train.loss", "train.focal_gamma", "train.class_weights", "train.label_smoothing")  # fmt: skip


def drawn(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and arguments of a combination: each is left at its default in half of the draws."""
    rng = random.Random(f"{SEED} {number}")
    keys, arguments = (
        {name: rng.choice(values) for name, values in table.items() if rng.random() < 0.5}
        for table in (KEYS, ARGUMENTS)
    )
    if keys.get("train.epochs") is not None and rng.random() < 0.9:
        keys["train.max_steps"] = None
    return keys, {name: value for name, value in arguments.items() if value is not None}


def words(keys: dict[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in keys.items()]


def checked(
    build: Callable[..., Any], project: Path, tmp_path: Path, keys: dict[str, Any], arguments: dict[str, Any]
) -> Any:
    """The trainer of a combination on one process; InputError refuses it, as before a run."""
    overrides = [f"train.arguments={json.dumps(arguments)}", *words(keys)]
    plan = plan_for(project / "recipe.yaml", JobRequest(overrides=overrides, num_processes=1, gpus_per_node=0))
    check_arguments(plan.recipe.train, tmp_path / "pins", plan.recipe.train.schedule(64, 16).total_steps)
    return build(arguments, *words(keys), train=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", some_of(range(DRAWS, DRAWS + PAIRS), 3))
def test_a_combination_on_two_processes_is_that_on_one(
    build: Callable[..., Any], project: Path, number: int, tmp_path: Path
) -> None:
    """Without dropout and noise, whose random numbers depend on the number of processes."""
    keys, arguments = drawn(number)
    keys |= {"model": str(project / "still"), "train.precision": "fp32", "train.log_every": 1}
    arguments.pop("neftune_noise_alpha", None)
    print(f"AFINA_TEST_SEED={SEED}, draw {number}: {words(keys)} {arguments}")
    overrides = [f"train.arguments={json.dumps(arguments)}", *words(keys)]
    try:
        env = {"AFINA_SCRATCH": str(project / "scratch")}
        run = train_here(project / "recipe.yaml", tmp_path / "two", *overrides, num_processes=2, env=env)
    except InputError as refused:
        assert refused.remedy, refused
        return
    two = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trainer = checked(build, project, tmp_path, keys, arguments)
    trainer.train()
    one = lines(trainer)
    assert [(line["step"], line.keys()) for line in one] == [(line["step"], line.keys()) for line in two]
    first, second = ([line["loss"] for line in log if "loss" in line] for log in (one, two))
    assert first[0] == pytest.approx(second[0], rel=2e-5, abs=1e-6)
    # An optimizer that divides by the gradient's size makes rounding errors large in a few parameters.
    assert first == pytest.approx(second, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("number", some_of(range(DRAWS), 12))
def test_a_combination_is_refused_or_trains_to_the_end(
    build: Callable[..., Any], project: Path, number: int, tmp_path: Path
) -> None:
    keys, arguments = drawn(number)
    print(f"AFINA_TEST_SEED={SEED}, draw {number}: {words(keys)} {arguments}")
    try:
        trainer = checked(build, project, tmp_path, keys, arguments)
    except InputError as refused:
        assert refused.remedy, refused
        return
    attempt = trainer.attempt
    trainer.train()
    attempt.saver.finish()
    results = export_results(trainer)
    logged = lines(trainer)
    losses = [line["loss"] for line in logged if "loss" in line]
    steps = attempt.schedule.total_steps
    assert trainer.state.global_step == steps and losses and np.isfinite(losses).all()
    last = [line["step"] for line in logged]
    assert last == sorted(last) and last[-1] == steps
    assert 1 <= results.model_step <= steps and (attempt.run.model / "model.safetensors").is_file()
    assert isinstance(results.metrics["eval_loss"], float) and results.metrics["eval_accuracy"] is not None
    evaluated = {line["step"]: line for line in logged if "eval_loss" in line}
    assert steps in evaluated, "the last step is evaluated"
    best = f"eval_{attempt.data.best_metric}"
    values = {step: line[best] for step, line in evaluated.items() if line.get(best) is not None}
    if attempt.keeps_best and values:
        choose = min if best == "eval_log_loss" else max
        assert values[results.model_step] == choose(values.values())
        assert results.metrics[best] == pytest.approx(values[results.model_step], rel=1e-6)
    else:
        assert results.model_step == steps
    if attempt.batching != "packed":
        return
    same = {
        **{name: keys[name] for name in SAME if name in keys},
        "train.precision": "fp32",
        "train.max_steps": 2,
        "train.log_every": 1,
    }
    first, second = (
        [line["loss"] for line in lines(trained) if "loss" in line]
        for way in ("packed", "padded")
        for trained in [build({"optim": "sgd"}, f"model={project / 'still'}", *words({**same, "tokens.batching": way}))]
    )
    assert first and first == pytest.approx(second, rel=2e-5, abs=1e-6)
