"""Before a submission: what no partition will ever run is refused, and what the run will take is foreseen and written down."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from afina.errors import EnvironmentProblem, SlurmError
from afina.files import write_atomic
from afina.forecast.estimate import Estimate, Measured, forecast
from afina.forecast.evidence import earlier_runs, rehearse, shape_of
from afina.run.directory import RunDir
from afina.run.plan import Plan
from afina.slurm.cluster import Cluster, read_cluster
from afina.slurm.limits import job_size, limit_of, refusal

__all__ = ["check_possible", "foresee", "write_forecast"]


def check_possible(plan: Plan) -> Cluster:
    """Refuse what no partition that is asked for will ever run. What Slurm does not say is not held against anybody.

    Returns: what the cluster says of itself.

    Raises:
        SlurmError: the time, nodes, GPUs, cores or memory asked for, and what there is.
    """
    found = read_cluster()
    refused = refusal(job_size(plan, os.environ), found)
    if refused is not None:
        raise SlurmError(*refused)
    return found


def foresee(
    plan: Plan, prepared: Mapping[str, Any], found: Cluster | None = None, measured: Measured | None = None
) -> Estimate:
    """The forecast of a plan: from what was measured, else from earlier runs like it, else from the model's numbers.

    Args:
        prepared: what the prepare stage said.
        found: the cluster, for the limit of the partition.

    Raises:
        EnvironmentProblem: model or prepared data cannot be read.
    """
    limit = None if found is None else limit_of(job_size(plan, os.environ), found)
    return forecast(plan, shape_of(plan, prepared), measured=measured, earlier=earlier_runs(plan), limit_min=limit)


def write_forecast(plan: Plan, directory: RunDir, found: Cluster, *, rehearsed: bool) -> None:
    """`estimate.json` of a run that was just claimed, for the report to set beside what was used.

    Args:
        rehearsed: rehearse first; if that fails, the run directory goes.

    Raises:
        AfinaError: as the rehearsal.
    """
    prepared = directory.prepared()
    try:
        measured = rehearse(plan, prepared) if rehearsed else None
    except BaseException:
        shutil.rmtree(directory.path)
        raise
    with contextlib.suppress(EnvironmentProblem):  # a forecast that cannot be made holds nobody up
        said = {**foresee(plan, prepared, found, measured).to_json(), "measured": measured and measured.model_dump()}
        write_atomic(directory.path / "estimate.json", json.dumps(said, indent=2) + "\n")
