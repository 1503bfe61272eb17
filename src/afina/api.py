"""The Python API: recipe in, run out.

afina.submit("recipe.yaml", nodes=2).result()
afina.train("recipe.yaml", overrides=["train.epochs=1"])
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afina.errors import AfinaError, InputError
from afina.forecast.forecast import write_forecast
from afina.recipe.load import any_recipe
from afina.recipe.schema import Recipe
from afina.run.commands import sbatch_argv
from afina.run.directory import RunDir
from afina.run.job_request import JobRequest, SubmitOptions, Via, accepts
from afina.run.new_run import claim_run
from afina.run.plan import Plan, check_cores, geometry_for, make_plan
from afina.run.supervise import ensure_outcome, run_node
from afina.site.gpus import DRIVER_FILE, mig_slices, visible
from afina.site.image import check_image
from afina.site.settings import environment, load_site
from afina.slurm.client import AMBIGUOUS, need_slurm, version
from afina.slurm.limits import check_possible
from afina.slurm.submit import check_not_queued, submit_sbatch
from afina.slurm.submitit_job import submit_submitit, submitit_script
from afina.watch.handle import Run, run_named

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "claim",
    "dry_run",
    "on_this_machine",
    "plan_for",
    "plan_to_submit",
    "resume",
    "submit",
    "submit_to_slurm",
    "train",
    "train_here",
    "visible_gpus",
]


def plan_for(recipe: str | Path | Recipe, request: JobRequest = JobRequest()) -> Plan:
    """Load recipe and site as the request says, and compose the plan."""
    loaded = any_recipe(recipe, request.overrides)
    return make_plan(loaded, load_site(request.site, job=request.in_job), request)


def claim(plan: Plan, path: str | Path | None = None, *, text: str | None = None) -> RunDir:
    """Prepare, then claim a run directory; see `claim_run`."""
    return claim_run(plan, path, slurm=version, text=text)


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
    request = JobRequest(overrides=overrides, run=run, site=site, num_processes=num_processes)
    return train_here(recipe, request)


def train_here(recipe: str | Path | Recipe, request: JobRequest) -> Run:
    """`train` for a request."""
    plan = plan_for(recipe, on_this_machine(request))
    directory = claim(plan, request.run)
    print(f"afina: run {directory.path}", flush=True)
    _attempt(directory, {})
    return Run(directory.path)


def on_this_machine(request: JobRequest) -> JobRequest:
    """The request for this machine alone: its processes, by default one per visible GPU, or one.

    Raises:
        InputError: more processes than cores.
    """
    gpus = visible_gpus()
    processes = request.num_processes if request.num_processes is not None else gpus or 1
    check_cores(processes)
    return replace(request, num_processes=processes, gpus_per_node=gpus, nodes=None)


def resume(path: str | Path, *, num_processes: int | None = None) -> Run:
    """Continue a run here from its newest checkpoint. A finished one is returned as it is.

    Raises:
        InputError: it was moved, its checkpoints are gone, or its plan is for several nodes.
    """
    run = Run(path)
    outcome = run.outcome
    if outcome is not None and outcome.outcome == "finished":
        steps = f" its {outcome.global_step} steps" if outcome.global_step else ""
        print(f"afina: nothing to do: this run has finished{steps}; {run.dir.how_to_train_on()}", file=sys.stderr)
        return run
    plan = run.dir.plan()
    run.dir.check_place()
    run.dir.check_progress()
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


@accepts(SubmitOptions, JobRequest)
def submit(recipe: str | Path | Recipe, **options: Unpack[SubmitOptions]) -> Run:
    """Prepare, claim and submit to Slurm; returns at once. `recipe` may be a run: it is submitted again.

    Args:
        options: of `JobRequest`; for a run only `time_min` (the job's time limit in minutes) and `via`.

    Raises:
        AfinaError: what would have failed in the queue is refused here.
    """
    return submit_to_slurm(recipe, JobRequest(**options))


def submit_to_slurm(recipe: str | Path | Recipe, request: JobRequest) -> Run:
    """`submit` for a request."""
    need_slurm()
    plan, handle = plan_to_submit(recipe, request)
    if handle is not None:
        directory = handle.dir
        if handle.state in ("PENDING", "RUNNING", "FINISHED"):
            remedy = directory.how_to_train_on() if handle.state == "FINISHED" else "nothing to submit"
            raise InputError(f"{recipe}: this run is {handle.state}", remedy)
        check_not_queued(directory)
        directory.check_place()
        directory.check_progress()
        check_image(plan.site)
        check_possible(plan)
    else:
        cluster = check_possible(plan)
        directory = claim(plan, request.run)
        write_forecast(plan, directory, cluster, rehearsed=request.rehearse)
    try:
        (submit_sbatch if request.via == "sbatch" else submit_submitit)(plan, directory)
    except AfinaError as error:
        if handle is None and error.cause != AMBIGUOUS:  # claimed a moment ago, for this submission
            shutil.rmtree(directory.path)
        raise
    return Run(directory.path)


def plan_to_submit(recipe: str | Path | Recipe, request: JobRequest) -> tuple[Plan, Run | None]:
    """What `submit` submits: a new plan, or a run and its own plan, of which only the time limit can change.

    Raises:
        InputError: the request changes something else of a run.
    """
    handle = run_named(recipe)
    if handle is None:
        return plan_for(recipe, request), None
    given = {
        "--set": request.overrides or None,
        "--run": request.run,
        "--site": request.site,
        "--nodes": request.nodes,
        "--gpus-per-node": request.gpus_per_node,
        "--rehearse": request.rehearse or None,
    }
    if named := [option for option, value in given.items() if value is not None]:
        raise InputError(
            f"{named[0]}: {handle.path} is a run, which continues as it was planned; only --time can change",
            "leave it out, or start another run from the recipe",
        )
    plan = handle.dir.plan()
    if request.time_min is None:
        return plan, handle
    resources = plan.recipe.resources.model_copy(update={"time": request.time_min})
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
        claimed: `path` is a run that is resumed.
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
