"""The suite of faults through a real Slurm, in the real image: what only a cluster can do to a run.

One process, under both process trackers, and two nodes with two processes each for what concerns several. The whole
table, every case on every geometry, is what `run.py --where slurm` makes in a night.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults import stories
from tests.faults.cases import case
from tests.faults.live import Setting
from tests.faults.on_slurm import Cluster
from tests.faults.run import Suite, slurm_suite

SEED = os.environ.get("AFINA_FAULTS_SEED") or str(random.randrange(10**6))

#: What the two trackers treat differently, and the causes of a requeue; the rest is for the night.
ONE = ("kill-host", "term-step", "preempt")
FOUR = ("term-step", "node-fail")


@pytest.fixture(scope="module")
def folder(image: Path) -> Iterator[Path]:
    """The project folder; pytest's own is closed to everybody but root."""
    path = Path(tempfile.mkdtemp(prefix="afina's faults ", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def one(image: Path, folder: Path, cluster: Cluster) -> Suite:
    """Both trackers share the undisturbed run: they signal differently, they train alike."""
    return slurm_suite(folder / "one", Setting("slurm"), cluster, image)


@pytest.fixture(scope="module")
def four(image: Path, folder: Path, cluster: Cluster) -> Suite:
    return slurm_suite(folder / "four", Setting("slurm", 2, 2), cluster, image)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ONE)
def test_a_job_survives(one: Suite, tracker: str, name: str) -> None:
    _survives(one, name, tracker)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FOUR)
def test_a_job_on_two_nodes_survives(four: Suite, name: str) -> None:
    _survives(four, name)


def _survives(suite: Suite, name: str, tracker: str = "") -> None:
    fault = case(name)
    if reason := suite.applies(fault):
        pytest.fail(reason)
    told = suite.tell(fault, f"{SEED}{tracker}")
    if not told.struck:  # came too late, and proves nothing
        told = suite.tell(fault, f"{SEED}{tracker}/again")
    print(f"AFINA_FAULTS_SEED={SEED}\n{stories.table([told])}\n{told.difference}")
    assert not told.broken
    assert told.struck
