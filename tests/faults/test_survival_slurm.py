"""The fault suite through a real Slurm, in the real image: scenarios that need a cluster.

One process, under both process trackers, and one on each of two nodes: tests/slurm/test_jobs.py trains with two on each, and the
suite without a cluster strikes them. One scenario with a job from Python, since tests/slurm/test_python.py gives every kind of
fault to scripted trainings both ways. The whole table, every scenario on every geometry, takes a night: `run.py --where slurm`,
with `--via submitit` for jobs from Python.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults import results
from tests.faults.live_run import Setting
from tests.faults.run import Suite, python_suite, slurm_suite
from tests.faults.scenarios import find_scenario
from tests.faults.slurm_run import Cluster

SEED = os.environ.get("AFINA_FAULTS_SEED") or str(random.randrange(10**6))

#: Where the two trackers differ, and the causes of a requeue.
ONE = ("kill-host", "term-step", "preempt")
TWO = ("term-step", "node-fail")


@pytest.fixture(scope="module")
def folder(image: Path) -> Iterator[Path]:
    """The project folder; pytest's own is readable by root only."""
    path = Path(tempfile.mkdtemp(prefix="afina's faults ", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def one(image: Path, folder: Path, cluster: Cluster) -> Suite:
    """Both trackers share the undisturbed run: they differ in signals, not in training."""
    return slurm_suite(folder / "one", Setting("slurm"), cluster, image)


@pytest.fixture(scope="module")
def two(image: Path, folder: Path, cluster: Cluster) -> Suite:
    return slurm_suite(folder / "two", Setting("slurm", 2), cluster, image)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ONE)
def test_a_job_survives(one: Suite, tracker: str, name: str) -> None:
    _survives(one, name, tracker)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TWO)
def test_a_job_on_two_nodes_survives(two: Suite, name: str) -> None:
    _survives(two, name)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["preempt"])
def test_a_job_from_python_survives(one: Suite, cluster: Cluster, host: Path, name: str) -> None:
    _survives(python_suite(one, cluster, host), name)


def _survives(suite: Suite, name: str, tracker: str = "") -> None:
    scenario = find_scenario(name)
    if reason := suite.applies(scenario):
        pytest.fail(reason)
    result = suite.run(scenario, f"{SEED}{tracker}")
    if not result.injected:  # the fault came too late, which proves nothing
        result = suite.run(scenario, f"{SEED}{tracker}/again")
    print(f"AFINA_FAULTS_SEED={SEED}\n{results.table([result])}\n{result.difference}")
    assert not result.broken
    assert result.injected
