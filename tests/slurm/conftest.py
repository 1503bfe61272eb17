"""Fixtures of the tests that need a real Slurm: the cluster, the process tracker, a folder of the ordinary user.

Without Slurm, or without root, these tests are skipped with the reason; AFINA_REQUIRE_CLUSTER=1 makes that a failure.
AFINA_CLUSTER=STATE_DIR uses the cluster that `cluster.py up --state STATE_DIR` has started, and leaves it running; without
it each session starts its own (about four seconds) and stops it; AFINA_CLUSTER_ACCOUNTING=0 leaves slurmdbd and sacct
out. A failed test shows `Cluster.diagnose()`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs
from projects import ScriptedRun, host_programs


def _unavailable(reason: str) -> None:
    if os.environ.get("AFINA_REQUIRE_CLUSTER") == "1":
        pytest.fail(f"AFINA_REQUIRE_CLUSTER=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes n1 and n2 with 4 CPUs and 2 GPUs each, accounting, partitions gpu and urgent."""
    accounting = os.environ.get("AFINA_CLUSTER_ACCOUNTING") != "0"
    if missing := missing_programs(accounting):
        _unavailable(f"Slurm is not installed ({', '.join(missing)}): run tests/slurm/install.sh")
    if os.geteuid() != 0:
        _unavailable("the test cluster needs root")
    if existing := os.environ.get("AFINA_CLUSTER"):
        yield Cluster.attach(Path(existing))
        return
    state = Path(tempfile.mkdtemp(prefix="afina-cluster-", dir="/tmp"))
    try:
        with Cluster(state, accounting=accounting) as up:
            yield up
    finally:
        shutil.rmtree(state)


@pytest.fixture(scope="session", params=["linuxproc", "cgroup"])
def tracker(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """The cluster under each process tracker in turn: a test with this fixture runs twice."""
    if request.param == "cgroup" and (reason := Cluster.cgroup_unavailable()):
        _unavailable(reason)
    if cluster.proctrack != request.param:
        cluster.restart(proctrack=request.param)
    return str(request.param)


@pytest.fixture(scope="session")
def image() -> Path:
    """The image that the jobs run in, readable by the ordinary user."""
    path = os.environ.get("AFINA_TEST_IMAGE", "")
    if not Path(path).is_file():
        _unavailable("AFINA_TEST_IMAGE names no image: run tests/apptainer/build_image.sh OUT.sif")
    return Path(path).resolve()


@pytest.fixture(scope="session")
def host() -> Iterator[Path]:
    """Programs of a virtual environment with afina's host side; see `host_programs`."""
    with host_programs() as folder:
        yield folder


@pytest.fixture
def folder(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty folder of the ordinary user; pytest's tmp_path is readable by root only."""
    name = re.sub(r"\W+", "-", request.node.name)
    path = Path(tempfile.mkdtemp(prefix=f"afina-{name}-", dir="/tmp"))
    shutil.chown(path, cluster.user, cluster.user)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def project(cluster: Cluster, folder: Path, host: Path) -> Iterator[Callable[..., ScriptedRun]]:
    """Makes a run with a scripted worker on a site with these settings."""
    yield lambda **site: ScriptedRun(cluster, folder, host / "python", site)
    cluster.cancel_all()


@pytest.fixture
def here(cluster: Cluster, project: Callable[..., ScriptedRun], monkeypatch: pytest.MonkeyPatch) -> ScriptedRun:
    """A run that this process submits, with programs on PATH in front of Slurm's."""
    made = project()
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    monkeypatch.setenv("PATH", f"{made.folder}/bin:/usr/bin:/bin")
    monkeypatch.chdir(made.folder)
    monkeypatch.setattr("afina.slurm.submit._PAUSES_S", (0.5,))
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    up = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(up, Cluster):
        report.sections.append(("the cluster", up.diagnose()))
    return report
