"""Prepare the data of a plan and claim its run directory: what happens on the host before anything is submitted or trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from afina.redact import redact_comments
from afina.run.commands import host_environment, job_scripts, node_argv, worker_argv
from afina.run.directory import RunDir
from afina.run.plan import Plan
from afina.run.provenance.record import make_record
from afina.run.workers import ask_worker
from afina.site.image import check_image

__all__ = ["claim_run", "prepare"]


def prepare(plan: Plan, *, refresh: bool = False) -> dict[str, Any]:
    """Pin, load, check, tokenise and publish the data of a plan, in a worker process; returns the worker's answer.

    Args:
        refresh: look up the revisions on the Hub again.

    Raises:
        AfinaError: the worker's.
    """
    env = host_environment(plan, offline=False)
    env |= {"AFINA_REFRESH": "1"} if refresh else {}
    return ask_worker(worker_argv(plan, "prepare"), env, plan.model_dump(mode="json"), name="the prepare stage")


def claim_run(
    plan: Plan,
    path: str | Path | None = None,
    *,
    slurm: Callable[[], str | None],
    text: str | None = None,
    prepared: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    scripts: Mapping[str, Path] | None = None,
) -> RunDir:
    """Check the image, prepare, then claim a run directory: bad data leaves nothing behind.

    Args:
        path: the run directory; by default the next free one of the plan.
        slurm: gives Slurm's version for the record; called after the image has been checked.
        text: the recipe's text, if it is not that of the plan's recipe file.
        prepared: the answer of `prepare`, if it was called: the runs of a sweep share it.
        record: likewise of `make_record`.
        scripts: what the job runs; by default `job_scripts()`.
    """
    RunDir.check_free(path)
    if prepared is None:
        check_image(plan.site)
        prepared = prepare(plan)
    argv = node_argv(plan, _extra_binds(plan, path))
    if text is None:
        whole = json.dumps(plan.recipe.model_dump(mode="json"), indent=2)
        text = plan.recipe_file.read_text(encoding="utf-8") if plan.recipe_file else whole
    text = redact_comments(text)
    record = record or make_record(plan, prepared, text, slurm())
    return RunDir.claim(plan, prepared, argv, text, path, scripts=scripts or job_scripts(), record=record)


def _extra_binds(plan: Plan, path: str | Path | None) -> list[Path]:
    """A run directory outside scratch must be visible in the container; it does not exist yet, its parent does."""
    if path is None or Path(path).absolute().is_relative_to(plan.site.scratch):
        return []
    return [Path(path).absolute().parent]
