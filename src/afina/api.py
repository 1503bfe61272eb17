"""The Python API: recipe in, run out. Composes recipe, site, plan, run directory, launch and Slurm.

afina.submit("recipe.yaml", nodes=2).result()
afina.train("recipe.yaml", overrides=["train.epochs=1"])
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from afina.errors import AfinaError, InputError
from afina.forecast.forecast import check_possible, write_forecast
from afina.recipe.schema import Recipe, load_recipe
from afina.run.commands import job_scripts, node_argv, sbatch_argv, worker_argv, worker_environment
from afina.run.directory import RunDir
from afina.run.plan import Plan, check_cores, geometry_for, make_plan
from afina.run.record import make_record
from afina.run.supervise import ensure_outcome, run_node
from afina.run.workers import ask_worker
from afina.site.gpus import DRIVER_FILE, mig_slices, visible
from afina.site.image import check_image
from afina.site.settings import environment, hub_token, load_site
from afina.slurm.client import need_slurm, version
from afina.slurm.submit import submit_sbatch
from afina.slurm.submitit_job import submit_submitit, submitit_script
from afina.watch.handle import Run, run_named

__all__ = [
    "claim",
    "dry_run",
    "plan_for",
    "plan_to_submit",
    "prepare",
    "resume",
    "submit",
    "train",
    "visible_gpus",
]

Via = Literal["sbatch", "submitit"]


def plan_for(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    site: str | Path | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    time_min: int | None = None,
    num_processes: int | None = None,
    job: bool = False,
) -> Plan:
    """Recipe and site to a plan. `num_processes` makes it one for this machine alone, `job` one for the allocation we are in."""
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    where = load_site(site, job=job)
    local = {"nodes": 1, "processes_per_node": num_processes} if num_processes is not None else {"nodes": nodes}
    return make_plan(
        loaded,
        where,
        recipe_file=None if isinstance(recipe, Recipe) else recipe,
        gpus_per_node=gpus_per_node,
        time_min=time_min,
        **local,
    )


def prepare(plan: Plan, *, refresh: bool = False) -> dict[str, Any]:
    """Pin, load, check, tokenise and publish the data of a plan, in a worker process; returns what it prepared.

    Raises:
        AfinaError: as the worker said it.
    """
    here = {**os.environ, **environment(plan.site)}
    env = {
        **here,
        **worker_environment(plan, offline=False, env=here),
        **hub_token(here),
        **({"AFINA_REFRESH": "1"} if refresh else {}),
    }
    return ask_worker(worker_argv(plan, "prepare"), env, plan.model_dump(mode="json"), name="the prepare stage")


def claim(
    plan: Plan,
    path: str | Path | None = None,
    *,
    text: str | None = None,
    prepared: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    scripts: Mapping[str, Path] | None = None,
) -> RunDir:
    """Prepare, then claim a run directory: bad data leaves nothing behind.

    Args:
        text: the recipe's text, where it is not what the plan's recipe file holds now.
        prepared: what `prepare` said, where the caller has called it: the runs of a sweep share it.
        record: likewise of `make_record`.
        scripts: what the job runs; by default `job_scripts()`.
    """
    RunDir.check_free(path)
    if prepared is None:
        check_image(plan.site)
        prepared = prepare(plan)
    argv = node_argv(plan, _extra_binds(plan, path))
    if text is None:
        text = (
            plan.recipe_file.read_text(encoding="utf-8")
            if plan.recipe_file
            else json.dumps(plan.recipe.model_dump(mode="json"), indent=2)
        )
    record = record or make_record(plan, prepared, text, version())
    return RunDir.claim(plan, prepared, argv, text, path, scripts=scripts or job_scripts(), record=record)


def _extra_binds(plan: Plan, path: str | Path | None) -> list[Path]:
    """A run directory outside scratch must be visible in the container; it does not exist yet, its parent does."""
    if path is None or Path(path).absolute().is_relative_to(plan.site.scratch):
        return []
    return [Path(path).absolute().parent]


def train(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    site: str | Path | None = None,
    num_processes: int | None = None,
) -> Run:
    """Train here, in the site's container or without one; returns when the attempt has ended.

    Args:
        run: the run directory; by default one under `$AFINA_SCRATCH/runs/`.
        num_processes: processes on this machine; by default one per visible GPU, or one.
    """
    processes = num_processes if num_processes is not None else visible_gpus() or 1
    check_cores(processes)
    plan = plan_for(recipe, overrides=overrides, site=site, num_processes=processes, gpus_per_node=visible_gpus())
    directory = claim(plan, run)
    print(f"afina: run {directory.path}", flush=True)
    _attempt(directory, {})
    return Run(directory.path)


def resume(path: str | Path, *, num_processes: int | None = None) -> Run:
    """Continue a run here from its newest checkpoint. A finished one is returned as it is."""
    run = Run(path)
    outcome = run.outcome
    if outcome is not None and outcome.outcome == "finished":
        return run
    plan = run.dir.plan()
    run.dir.check_place()
    check_image(plan.site)
    if num_processes is not None:
        check_cores(num_processes)
        geometry_for(plan.recipe, num_processes, nodes=1)
    elif plan.geometry.nodes > 1:
        raise InputError(
            f"{path}: was planned for {plan.geometry.nodes} nodes",
            "continue it on the cluster with `afina submit DIR`, or here with --num-processes N",
        )
    _attempt(run.dir, {"AFINA_PROCESSES": str(num_processes)} if num_processes else {})
    return run


def submit(
    recipe: str | Path | Recipe,
    *,
    via: Via = "submitit",
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    site: str | Path | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    time_min: int | None = None,
    rehearse: bool = False,
) -> Run:
    """Prepare, claim and submit to Slurm; returns at once. `recipe` may be a run: it is submitted again.

    Args:
        time_min: the job's time limit in minutes; the only one of these that can be changed for a run.
        rehearse: first make a few steps and a save here, with the network cut; what fails is not submitted.

    Raises:
        AfinaError: what would have failed in the queue is refused here.
    """

    need_slurm()
    asked = {"nodes": nodes, "gpus_per_node": gpus_per_node, "time_min": time_min}
    plan, handle = plan_to_submit(recipe, overrides=overrides, run=run, site=site, rehearse=rehearse, **asked)
    if handle is not None:
        directory = handle.dir
        if handle.state in ("PENDING", "RUNNING", "FINISHED"):
            raise InputError(f"{recipe}: this run is {handle.state}", "nothing to submit")
        directory.check_place()
        check_image(plan.site)
        check_possible(plan)
    else:
        found = check_possible(plan)
        directory = claim(plan, run)
        write_forecast(plan, directory, found, rehearsed=rehearse)
    try:
        (submit_sbatch if via == "sbatch" else submit_submitit)(plan, directory)
    except AfinaError:
        if handle is None:  # claimed a moment ago, for this submission
            shutil.rmtree(directory.path)
        raise
    return Run(directory.path)


def plan_to_submit(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    site: str | Path | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    time_min: int | None = None,
    rehearse: bool = False,
) -> tuple[Plan, Run | None]:
    """What `submit` submits: a new plan, or a run and its own plan, whose time limit alone can be changed.

    Raises:
        InputError: something else of a run is to be changed.
    """
    handle = run_named(recipe)
    if handle is None:
        plan = plan_for(
            recipe, overrides=overrides, site=site, nodes=nodes, gpus_per_node=gpus_per_node, time_min=time_min
        )
        return plan, None
    given = {
        "--set": overrides or None,
        "--run": run,
        "--site": site,
        "--nodes": nodes,
        "--gpus-per-node": gpus_per_node,
        "--rehearse": rehearse or None,
    }
    if named := [option for option, value in given.items() if value is not None]:
        raise InputError(
            f"{named[0]}: {handle.path} is a run, which goes on as it was planned; only --time can be changed",
            "leave it out, or start another run from the recipe",
        )
    plan = handle.dir.plan()
    if time_min is None:
        return plan, handle
    resources = plan.recipe.resources.model_copy(update={"time": time_min})
    return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"resources": resources})}), handle


def _attempt(directory: RunDir, env: dict[str, str]) -> None:
    folder = directory.begin_attempt()
    site = environment(directory.plan().site)
    code = run_node(directory, folder.name, env={**site, "AFINA_LAUNCH": "local", **env})
    outcome = ensure_outcome(directory, folder.name, code)
    recorded = directory.outcome()
    if recorded is None or recorded.attempt != folder.name:
        # Another attempt works there, or the disk is full: what the directory says is not about this attempt.
        assert outcome.failure is not None
        raise outcome.failure.error()


def visible_gpus() -> int:
    """GPUs this process may use, without importing torch: CUDA_VISIBLE_DEVICES, else the driver's list. Not measured on a GPU."""
    if not DRIVER_FILE.exists():
        return 0
    named = visible(os.environ)
    if named is not None:
        return 1 if named and mig_slices(os.environ) else len(named)  # one process uses one slice, and no more
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def dry_run(plan: Plan, via: Via, path: str | Path | None = None, *, claimed: bool = False) -> dict[str, Any]:
    """What `submit` would do with this plan: the run directory, the command, and with submitit its script. Changes nothing.

    Args:
        claimed: `path` is a run that goes on.
    """
    run = RunDir(path) if path else RunDir.next_free(plan)
    if not claimed:
        RunDir.check_free(run.path)
    if via == "sbatch":
        return {"run": str(run.path), "claimed": claimed, "command": sbatch_argv(plan, run.path)}
    return {
        "run": str(run.path),
        "claimed": claimed,
        "command": ["sbatch", str(run.path / "submitit/<id>_submission.sh")],
        "script": submitit_script(plan, run),
    }
