"""Trainings in the process of the test, and what they left: no process starts, which cost more than a tiny training."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from afina.api import plan_for
from afina.run.job_request import JobRequest
from afina.run.new_run import claim_run
from afina.worker.__main__ import main as door

__all__ = ["STEPS", "lines", "train_here", "weights"]

#: Optimizer steps of the project's recipe.
STEPS = 4


def train_here(
    recipe: Path,
    run: Path,
    *overrides: str,
    num_processes: int = 1,
    code: int = 0,
    env: Mapping[str, str] = {},
    constants: Mapping[str, object] = {},
) -> Path:
    """A run as `afina train` leaves it, whose processes ended with `code`; returns `run`.

    Prepared in this process and trained in forks: a new process would import PyTorch and Transformers again.
    `constants` are those of the worker's modules that have another value there.
    """
    from afina.worker.checks.model_check import check_model_on_rows
    from afina.worker.data.prepare import prepare

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": "1", **env}.items():
            patch.setenv(name, value)
        plan = plan_for(recipe, JobRequest(overrides=overrides, num_processes=num_processes, gpus_per_node=0))
        prepared = prepare(plan)
        prepared["warnings"] += check_model_on_rows(plan, prepared, print)
        log = claim_run(plan, run, prepared=prepared).begin_attempt("local-1") / "node0.log"
        group = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1"}
        group |= {"MASTER_PORT": _free_port(), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        workers = []
        for rank in range(num_processes):
            of_rank = {**group, "RANK": rank, "LOCAL_RANK": rank} if num_processes > 1 else {}
            given = {**os.environ, **{name: str(value) for name, value in of_rank.items()}}
            workers.append(_FORKS.Process(target=_work, args=(run, log, given, constants), daemon=True))
            workers[-1].start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [code] * num_processes, log.read_text()
    return run


#: Forks of a process that has imported what a training needs, and has trained nothing.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["afina.worker.training.trainer", "afina.worker.training.results", __name__])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(run: Path, log: Path, env: dict[str, str], constants: Mapping[str, object]) -> None:
    """`python -m afina.worker train RUN`, whose output goes to `log`."""
    os.environ.clear()
    os.environ.update(env)
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(import_module(module), constant, value)
    with log.open("a", encoding="utf-8", buffering=1) as sys.stdout:
        sys.stderr = sys.stdout
        sys.exit(door(["train", str(run)]))


def weights(trainer: Any) -> Any:
    """All parameters as one vector."""
    import torch

    return torch.cat([p.detach().float().flatten() for p in trainer.model.parameters()])


def lines(trainer: Any) -> list[dict[str, Any]]:
    """The metrics log."""
    return [json.loads(line) for line in trainer.attempt.run.metrics_file.read_text().splitlines()]
