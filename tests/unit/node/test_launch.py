"""The start of a job on several nodes, of which one never comes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from afina.recipe.schema import Recipe
from afina.run import new_run
from afina.run.plan import make_plan
from afina.run.requeue import finish_attempt
from afina.site.settings import Site


@pytest.mark.series
@pytest.mark.timeout(240)
@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_never_comes_ends_the_start_with_a_message(
    recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site, tmp_path: Path, node: int
) -> None:
    """The limit is `ddp_timeout`. The first time the job is requeued, the second time it ends."""
    changes = {
        "resources": {"nodes": 2, "gpus_per_node": 0},
        "train": {"arguments": {"ddp_timeout": 3}, "batch_size": 8},
    }
    run = new_run.claim(make_plan(recipe(**changes), site, recipe_file=recipe_file()), {}, ["x"], "", tmp_path / "run")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = {"SLURM_NODEID": str(node), "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2", "AFINA_NODES": "n1 n2 "}
    meet = {"AFINA_LAUNCH": "slurm", "AFINA_HEAD": "127.0.0.1", "AFINA_PORT": str(port), "SLURM_JOB_ID": "7"}
    for restart, decision in ((0, "requeue"), (1, "end")):
        attempt = f"7.{restart}"
        folder = run.begin_attempt(attempt)
        argv = [sys.executable, "-m", "afina.worker", "launch", str(run.path)]
        env = {**os.environ, **nodes, **meet, "AFINA_ATTEMPT": attempt, "SLURMD_NODENAME": f"n{node + 1}"}
        with (folder / f"node{node}.log").open("wb") as log:
            code = subprocess.run(argv, env=env, stdout=log, stderr=log, timeout=100, check=False).returncode
        (folder / f"node{1 - node}.json").write_text("{}")  # it had begun, and got no further
        outcome = finish_attempt(run, attempt, code)
        assert outcome.failure is not None and (outcome.cause, outcome.exit_code) == ("rendezvous", 4), outcome
        assert (
            outcome.failure.message.startswith("the processes did not meet: ")
            and "ddp_timeout" in outcome.failure.remedy
        )
        assert (folder / "next").read_text().startswith(decision)
