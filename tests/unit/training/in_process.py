"""Trainings in the process of the test, and what they left: no process starts, which cost more than a tiny training."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.unit.forks import ForkedWorkers

from afina.api import plan_for
from afina.run.directory import RunDir
from afina.run.job_request import JobRequest
from afina.run.new_run import claim_run

__all__ = ["STEPS", "attempt_here", "lines", "train_here", "weights"]

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
        claim_run(plan, run, prepared=prepared)
        attempt_here(run, "local-1", num_processes=num_processes, code=code, constants=constants)
    return run


def attempt_here(
    run: Path,
    attempt: str,
    *,
    num_processes: int = 1,
    nodes: int = 1,
    code: int = 0,
    env: Mapping[str, str] = {},
    constants: Mapping[str, object] = {},
) -> None:
    """One attempt of a run, whose processes on all nodes end with `code`; they are forks, and nothing supervises them."""
    directory = RunDir(run)
    log = directory.begin_attempt(attempt) / "node0.log"
    directory.stop_file.unlink(missing_ok=True)
    argv = ["afina.worker", "train", str(run)]
    ended = ranks_here(argv, log, num_processes, nodes, {**env, "AFINA_ATTEMPT": attempt}, constants)
    assert ended == [code] * num_processes, log.read_text()


def ranks_here(
    argv: Sequence[str],
    log: Path,
    num_processes: int,
    nodes: int = 1,
    env: Mapping[str, str] = {},
    constants: Mapping[str, object] = {},
) -> list[int]:
    """The exit codes of `python -m ARGV` as processes of one group, on so many nodes; they are forks."""
    on_each = num_processes // nodes
    group = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": on_each, "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": _free_port(), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    started = []
    for rank in range(num_processes):
        place = {"RANK": rank, "LOCAL_RANK": rank % on_each, "GROUP_RANK": rank // on_each}
        of_rank = {**group, **place} if num_processes > 1 else {}
        given = {**os.environ, **env, **{name: str(value) for name, value in of_rank.items()}}
        with log.open("a") as file:
            command = [sys.executable, "-m", *argv]
            started.append(ForkedWorkers(command, env=given, stdout=file, stderr=file, constants=constants))
    return [each.wait() for each in started]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def weights(trainer: Any) -> Any:
    """All parameters as one vector."""
    import torch

    return torch.cat([p.detach().float().flatten() for p in trainer.model.parameters()])


def lines(trainer: Any) -> list[dict[str, Any]]:
    """The metrics log."""
    return [json.loads(line) for line in trainer.attempt.run.metrics_file.read_text().splitlines()]
