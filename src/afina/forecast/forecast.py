"""Write down before a submission what the run will take."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from afina.errors import EnvironmentProblem
from afina.files import write_atomic
from afina.forecast.estimate import Estimate, estimate
from afina.forecast.evidence import earlier_runs, rehearse, workload_of
from afina.forecast.measurements import Measured
from afina.run.directory import RunDir
from afina.run.plan import Plan
from afina.slurm.cluster import Cluster
from afina.slurm.job_limits import job_size, limit_of

__all__ = ["forecast", "write_forecast"]


def forecast(
    plan: Plan, prepared: Mapping[str, Any], cluster: Cluster | None = None, measured: Measured | None = None
) -> Estimate:
    """The forecast of a plan: from what was measured, else from earlier runs like it.

    Args:
        prepared: the answer of the prepare stage.
        cluster: for the time limit of the partition.

    Raises:
        EnvironmentProblem: see `workload_of`.
    """
    limit = None if cluster is None else limit_of(job_size(plan, os.environ), cluster)
    work = workload_of(plan, prepared)
    return estimate(plan, work, measured=measured, earlier=earlier_runs(plan), limit_min=limit)


def write_forecast(plan: Plan, directory: RunDir, cluster: Cluster, *, rehearsed: bool) -> None:
    """Write `estimate.json` of a run that was just claimed.

    Args:
        rehearsed: rehearse first; if that fails, the run directory is removed.

    Raises:
        AfinaError: from the rehearsal.
    """
    prepared = directory.prepared()
    try:
        measured = rehearse(plan, prepared) if rehearsed else None
    except BaseException:
        shutil.rmtree(directory.path)
        raise
    with contextlib.suppress(EnvironmentProblem):  # a forecast that cannot be made does not stop a submission
        values = forecast(plan, prepared, cluster, measured).to_json()
        values["measured"] = measured and measured.model_dump()
        write_atomic(directory.path / "estimate.json", json.dumps(values, indent=2) + "\n")
