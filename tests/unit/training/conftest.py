"""A project of 80 rows, and a training of it in the process of the test."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.unit.training.in_process import STEPS

from afina.api import plan_for
from afina.run.allocation import Allocation
from afina.run.job_request import JobRequest
from afina.run.new_run import claim


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout and one without (`still`), reviews with a column of weights, and a recipe."""
    train = {"max_steps": STEPS, "seed": 1, "precision": "auto", "fast_dropout": False}
    place = tiny.write_project(tmp_path_factory.mktemp("it's a place"), rows=80, train=train).parent
    rows = [{**row, "weight": (1, 0.5, 0, 4)[n % 4]} for n, row in enumerate(tiny.tiny_reviews(80, 7))]
    tiny.write_csv(place / "reviews.csv", rows)
    tiny.write_conll(place / "tags.conll", tiny.tagged_sentences(80, 7))
    config = json.loads((shutil.copytree(place / "model", place / "still") / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (place / "still/config.json").write_text(json.dumps(config))
    return place


@pytest.fixture
def build(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Builds the trainer of a run with these training arguments and overrides; `train=True` trains it."""
    import torch
    import transformers
    from accelerate.state import AcceleratorState

    from afina.worker.data.prepare import prepare
    from afina.worker.survival.lease import Lease
    from afina.worker.survival.stop import StopRequest
    from afina.worker.training.attempt import open_data
    from afina.worker.training.build import build_attempt
    from afina.worker.training.trainer import RunTrainer

    monkeypatch.setenv("AFINA_SCRATCH", str(project / "scratch"))
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    }
    verbosity = transformers.logging.get_verbosity()
    leases: list[Any] = []

    def make(arguments: dict[str, Any], *overrides: str, train: bool = True) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        words = [f"train.arguments={json.dumps(arguments)}", *overrides]
        plan = plan_for(project / "recipe.yaml", JobRequest(overrides=words, num_processes=1, gpus_per_node=0))
        prepared = prepare(plan)
        run = claim(plan, prepared, ["true"], "", tmp_path / f"run {len(leases)}")
        run.begin_attempt("local-1")
        leases.append(Lease(run, "local-1"))
        leases[-1].take()
        data = open_data(plan, prepared, verify=False)
        allocation = Allocation(attempt="local-1")
        attempt, model, built = build_attempt(run, allocation, plan.geometry, data, StopRequest(run), leases[-1])
        trainer = RunTrainer(attempt, model, built)
        if train:
            trainer.train()
            attempt.saver.finish()
        return trainer

    yield make
    for lease in leases:
        lease.release()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    transformers.logging.set_verbosity(verbosity)
