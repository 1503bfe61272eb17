"""The cluster and its process tracker are those of tests/slurm; their fixtures are taken over by name."""

from __future__ import annotations

from tests.faults import on_slurm  # noqa: F401  puts tests/slurm on the path
from tests.slurm.conftest import cluster, pytest_runtest_makereport, tracker  # noqa: F401
