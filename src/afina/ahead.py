"""Ahead of a run, from Python and for the command line: `prefetch`, `rehearse` and `doctor`.

import afina
afina.doctor("recipe.yaml")
afina.prefetch("recipe.yaml")["rows"]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from afina.api import AnyRecipe, plan_for
from afina.diagnosis import examine, inside
from afina.diagnosis.target import Target
from afina.errors import AfinaError
from afina.forecast import evidence
from afina.forecast.estimate import Estimate
from afina.forecast.forecast import forecast
from afina.forecast.measurements import Measured
from afina.run.job_request import JobOptions, JobRequest, accepts
from afina.run.new_run import prepare
from afina.run.plan import Plan, bare_plan
from afina.site.finding import Finding
from afina.site.image import check_image
from afina.site.settings import environment, load_site
from afina.slurm.cluster import Cluster, read_cluster

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Rehearsed", "doctor", "prefetch", "rehearse", "target_for"]


class Rehearsed(NamedTuple):
    """Measurements of a rehearsal, and the forecast of the run that follows from them."""

    forecast: Estimate
    measured: Measured


def prefetch(
    recipe: AnyRecipe, *, overrides: Sequence[str] = (), site: str | Path | None = None, refresh: bool = False
) -> dict[str, Any]:
    """Fetch, check and prepare the model and the data of a recipe; jobs then need no network.

    Args:
        refresh: look up the revisions on the Hub again instead of the pinned ones.

    Returns:
        `prepared`, the folder; `reused`, whether it was there; `task`, `labels`, `rows` and `tokens` by split, `warnings`.

    Raises:
        AfinaError: bad data, a model that does not fit, or what a job would have met.
    """
    return _prepared(recipe, JobRequest(overrides=overrides, site=site), refresh=refresh)[1]


@accepts(JobOptions, JobRequest)
def rehearse(recipe: AnyRecipe, *, seconds: float = 10.0, **options: Unpack[JobOptions]) -> Rehearsed:
    """Run a few training steps, a save and an evaluation here, without network, and forecast the run. Leaves nothing behind.

    Args:
        seconds: time steps for about this long.
        options: of `JobRequest`.

    Raises:
        AfinaError: as `prefetch`, or the steps fail.
    """
    plan, prepared = _prepared(recipe, JobRequest(**options))
    measured = evidence.rehearse(plan, prepared, seconds=seconds)
    return Rehearsed(forecast(plan, prepared, read_cluster(accounting=False), measured), measured)


@accepts(JobOptions, JobRequest)
def doctor(recipe: AnyRecipe | None = None, *, in_image: bool = False, **options: Unpack[JobOptions]) -> list[Finding]:
    """Check everything that a job depends on: site, scratch, image, Slurm; with a recipe also that its partition can run it.

    Args:
        in_image: only the checks in the image, or here without one.
        options: of `JobRequest`.
    """
    target = target_for(recipe, JobRequest(**options), quick=in_image)
    return list(inside(target) if in_image else examine(target))


def _prepared(recipe: AnyRecipe, request: JobRequest, *, refresh: bool = False) -> tuple[Plan, dict[str, Any]]:
    plan = plan_for(recipe, request)
    check_image(plan.site)
    return plan, prepare(plan, refresh=refresh)


def target_for(recipe: AnyRecipe | None, request: JobRequest, *, quick: bool = False, with_job: bool = False) -> Target:
    """The subjects of the doctor's examination. A site or a recipe that cannot be read becomes a finding.

    Args:
        quick: Slurm is not asked.
        with_job: a test job follows, which checks what nodes see.
    """
    where = plan = error = None
    env = dict(os.environ)
    try:
        where = load_site(request.site)
        env |= environment(where)
        if recipe is not None:
            plan = plan_for(recipe, request)
        elif request.nodes or request.gpus_per_node:
            plan = bare_plan(where, nodes=request.nodes or 1, gpus_per_node=request.gpus_per_node or 0)
    except AfinaError as problem:
        error = problem
    return Target(env, Cluster() if quick else read_cluster(), where, plan, error, recipe is not None, with_job)
