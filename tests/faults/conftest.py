"""The cluster, its process tracker and the image are the fixtures of tests/slurm, imported by name."""

from __future__ import annotations

from tests.faults import slurm_run  # noqa: F401  adds tests/slurm to sys.path
from tests.slurm.conftest import cluster, host, image, pytest_runtest_makereport, tracker  # noqa: F401
