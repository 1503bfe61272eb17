"""The cluster, its process tracker and the image are those of tests/slurm; their fixtures are taken over by name."""

from __future__ import annotations

from tests.faults import on_slurm  # noqa: F401  puts tests/slurm on the path
from tests.slurm.conftest import cluster, image, pytest_runtest_makereport, tracker  # noqa: F401
