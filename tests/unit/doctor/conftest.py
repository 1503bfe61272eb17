"""A healthy small cluster on PATH, and what doctor finds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.common import program

from afina.diagnosis import examine
from afina.diagnosis.target import Target
from afina.site.finding import Finding
from afina.site.settings import Site
from afina.slurm.cluster import Cluster, parse_partitions

SINFO = "gpu*|up|1-00:00:00|1-4|2|8|64000|gpu:2|idle\nold|down|1:00:00|1-4|2|8|64000|(null)|down*\n"


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A healthy small cluster, first on PATH."""
    folder = tmp_path / "fake bin"
    program(folder, "sinfo", f"printf '{SINFO}'\n")
    program(folder, "scontrol", 'date "+Configuration data as of %Y-%m-%dT%H:%M:%S"; echo "KillWait = 30 sec"\n')
    for name in ("sbatch", "squeue", "scancel", "srun", "sacct", "sacctmgr"):
        program(folder, name, "exit 0\n")
    for name in ("quota", "lfs", "apptainer", "singularity"):
        program(folder, name, "exit 1\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def target(site: Site, cluster: Cluster | None = None, **more: object) -> Target:
    return Target(dict(os.environ), cluster or Cluster(parse_partitions(SINFO)), site, **more)  # type: ignore[arg-type]


def found(p: Target, check: str) -> list[Finding]:
    return [f for f in examine(p) if f.check == check]
