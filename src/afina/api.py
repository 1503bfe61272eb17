"""The Python API: recipe in, run out.

afina.submit("recipe.yaml", nodes=2).result()
afina.train("recipe.yaml", overrides=["train.epochs=1"])
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from afina.errors import InputError, SiteError
from afina.forecast.forecast import write_forecast
from afina.recipe.parse import any_recipe
from afina.recipe.schema import Recipe
from afina.run.causes import ensure_outcome
from afina.run.commands import sbatch_argv, sbatch_options
from afina.run.directory import RunDir
from afina.run.job_request import JobRequest, SubmitOptions, Via, accepts
from afina.run.new_run import check_free, claim_run, next_free
from afina.run.plan import Plan, check_cores, make_plan
from afina.run.supervise import background_argv, run_node
from afina.site.gpus import DRIVER_FILE, mig_slices, visible
from afina.site.settings import load_site
from afina.site.variables import sbatch_extra
from afina.slurm.client import need_slurm, version
from afina.slurm.job_limits import check_possible
from afina.slurm.submit import max_array_size, submit_array, submit_sbatch
from afina.slurm.submitit_job import submit_submitit, submitit_script
from afina.text import plural
from afina.watch.handle import Run, Runs, run_named

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: A recipe's file, a mapping of its keys, or one that was made before; `submit` also takes a run.
AnyRecipe = str | Path | Mapping[str, Any] | Recipe
Several = list[Any] | tuple[AnyRecipe, ...]

__all__ = [
    "claim",
    "dry_run",
    "on_this_machine",
    "plan_for",
    "plan_to_submit",
    "resume",
    "resume_here",
    "submit",
    "submit_many",
    "submit_to_slurm",
    "train",
    "train_here",
    "visible_gpus",
]


def plan_for(recipe: AnyRecipe, request: JobRequest = JobRequest()) -> Plan:
    """Load recipe and site as the request says, and compose the plan."""
    loaded = any_recipe(recipe, request.overrides)
    for warning in loaded.warnings:
        print(f"afina: warning: {warning}", file=sys.stderr)
    return make_plan(loaded, load_site(request.site, job=request.in_job), request)


def claim(plan: Plan, path: str | Path | None = None, *, text: str | None = None) -> RunDir:
    """Prepare, then claim a run directory; see `claim_run`."""
    return claim_run(plan, path, slurm=version(), text=text)


def train(
    recipe: AnyRecipe,
    *,
    overrides: Sequence[str] = (),
    run: str | Path | None = None,
    site: str | Path | None = None,
    num_processes: int | None = None,
    check: bool = True,
) -> Run:
    """Train here, in the site's container or without one; returns when the training has finished.

    Args:
        run: the run directory; by default one under `$AFINA_SCRATCH/runs/`.
        num_processes: processes on this machine; by default one per visible GPU, or one.
        check: raise unless it finished; without, the run is returned however it ended.

    Raises:
        Failed, Stopped, Cancelled: as `Run.result` raises them.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, when the checkpoint is on the disk.
    """
    received: list[int] = []
    request = JobRequest(overrides=overrides, run=run, site=site, num_processes=num_processes)
    return _checked(train_here(recipe, request, received), received, check)


def train_here(recipe: AnyRecipe, request: JobRequest, received: list[int] | None = None) -> Run:
    """`train` for a request; returns however the attempt ended. `received` gets the signals that arrived meanwhile."""
    plan = plan_for(recipe, on_this_machine(request))
    directory = claim(plan, request.run)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard output may be gone
        print(f"afina: run {directory.path}", flush=True)
    run = Run(directory.path)
    _attempt(directory, run.variables_here(), received)
    return run


def _checked(run: Run, received: Sequence[int], check: bool) -> Run:
    """Pass a signal on to the program that called, now that the checkpoint is there; then raise unless the run finished."""
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    for number in received:
        if number in (signal.SIGTERM, signal.SIGHUP):
            raise SystemExit(128 + number)
    if check:
        run.result()
    return run


def on_this_machine(request: JobRequest) -> JobRequest:
    """The request for this machine alone: its processes, by default one per visible GPU, or one.

    Raises:
        InputError: more processes than cores.
    """
    gpus = visible_gpus()
    processes = request.num_processes if request.num_processes is not None else gpus or 1
    check_cores(processes)
    return replace(request, num_processes=processes, gpus_per_node=gpus, nodes=None)


def resume(path: str | os.PathLike[str], *, num_processes: int | None = None, check: bool = True) -> Run:
    """Continue a run here from its newest checkpoint. A finished one is returned as it is.

    Raises:
        InputError: it was moved, its checkpoints are gone, or its plan is for several nodes.
        Failed, Stopped, Cancelled, KeyboardInterrupt, SystemExit: as `train`.
    """
    received: list[int] = []
    return _checked(resume_here(path, num_processes=num_processes, received=received), received, check)


def resume_here(
    path: str | os.PathLike[str], *, num_processes: int | None = None, received: list[int] | None = None
) -> Run:
    """`resume`; returns however the attempt ended."""
    run = Run(path)
    outcome = run.outcome
    if outcome is not None and outcome.outcome == "finished":
        steps = f" its {plural(outcome.global_step, 'step')}" if outcome.global_step else ""
        print(f"afina: nothing to do: this run has finished{steps}; {run.dir.how_to_train_on()}", file=sys.stderr)
        return run
    _attempt(run.dir, run.variables_here(num_processes), received)
    return run


@overload
def submit(recipe: AnyRecipe | Run, *, dry_run: Literal[True], **options: Unpack[SubmitOptions]) -> Plan: ...
@overload
def submit(recipe: AnyRecipe | Run, *, dry_run: Literal[False] = False, **options: Unpack[SubmitOptions]) -> Run: ...
@overload
def submit(recipe: Several, *, dry_run: Literal[True], **options: Unpack[SubmitOptions]) -> list[Plan]: ...
@overload
def submit(recipe: Several, *, dry_run: Literal[False] = False, **options: Unpack[SubmitOptions]) -> Runs: ...
@accepts(SubmitOptions, JobRequest)
def submit(
    recipe: AnyRecipe | Run | Several, *, dry_run: bool = False, **options: Unpack[SubmitOptions]
) -> Run | Plan | Runs | list[Plan]:
    """Prepare, claim and submit to Slurm; returns at once. `recipe` may be a run: it is submitted again.

    A list of recipes becomes one job array, or one for each size of job, through sbatch; if one is refused, none is submitted.

    Args:
        dry_run: change nothing, and return the plan, or the plans.
        options: of `JobRequest`; for a run only `time_min` (the job's time limit in minutes) and `via`.

    Raises:
        AfinaError: what would have failed in the queue is refused here.
    """
    if isinstance(recipe, list | tuple):
        options.setdefault("via", "sbatch")
        return _plans(recipe, JobRequest(**options)) if dry_run else submit_many(recipe, JobRequest(**options))
    request = JobRequest(**options)
    return plan_to_submit(recipe, request)[0] if dry_run else submit_to_slurm(recipe, request)


def submit_to_slurm(recipe: AnyRecipe | Run, request: JobRequest) -> Run:
    """`submit` for a request."""
    if request.via != "local":
        need_slurm()
    plan, handle = plan_to_submit(recipe, request)
    if handle is not None:
        return handle.submit(time_min=request.time_min, via=request.via, num_processes=request.num_processes)
    directory, job_plan = _claimed(plan, request)
    with _removed_if_refused(directory.path, directory):
        if request.via == "local":
            return Run(directory.path).submit(via="local", num_processes=plan.geometry.num_processes)
        (submit_sbatch if request.via == "sbatch" else submit_submitit)(job_plan, directory)
    return Run(directory.path)


def submit_many(recipes: Sequence[AnyRecipe], request: JobRequest) -> Runs:
    """Submit several recipes, each with a run directory of its own, as one job array for each size of job.

    Raises:
        AfinaError: as `submit`; nothing of what was not submitted is left.
    """
    need_slurm()
    plans = _plans(recipes, request)
    for plan in plans:  # all before the first is prepared
        check_possible(_with_options(plan, request))
    runs, arrays = Runs(), dict[tuple[str, ...], list[tuple[RunDir, Plan]]]()
    with contextlib.ExitStack() as undo:
        for plan in plans:
            directory, job_plan = _claimed(plan, request)
            undo.enter_context(_removed_if_refused(directory.path, directory))
            runs.append(Run(directory.path))
            alike = tuple(word for word in sbatch_options(job_plan) if not word.startswith("--job-name="))
            arrays.setdefault(alike, []).append((directory, job_plan))
        size = max_array_size()
        for members in arrays.values():
            for first in range(0, len(members), size):
                _submit_array(members[first : first + size])
    return runs


def _submit_array(members: Sequence[tuple[RunDir, Plan]]) -> None:
    directories, (plan, *_) = [directory for directory, _ in members], [plan for _, plan in members]
    home = plan.site.scratch / "arrays" / f"{directories[0].path.name}-{secrets.token_hex(4)}"
    with _removed_if_refused(home, directories[0]):
        job = submit_array(plan, directories, home)
    print(f"afina: {plural(len(members), 'run')} submitted as job array {job}", file=sys.stderr)


def _claimed(plan: Plan, request: JobRequest) -> tuple[RunDir, Plan]:
    """The claimed run with its forecast, and the plan of its job."""
    job_plan = _with_options(plan, request)
    cluster = None if request.via == "local" else check_possible(job_plan)
    directory = claim(plan, request.run)
    if cluster is not None:
        write_forecast(plan, directory, cluster, rehearsed=request.rehearse)
    return directory, job_plan


@contextlib.contextmanager
def _removed_if_refused(folder: Path, run: RunDir) -> Iterator[None]:
    """Remove a folder that was made for a submission of `run`, if that is refused or interrupted, and no job of it may be queued."""
    try:
        yield
    except BaseException:
        if not any((run.path / name).exists() for name in ("submissions.jsonl", "intent.json")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _plans(recipes: Sequence[AnyRecipe], request: JobRequest) -> list[Plan]:
    """The plans of several recipes.

    Raises:
        InputError: what is for one run alone, or not for a list.
    """
    if request.run is not None:
        raise InputError("run: names one run directory, and there are several recipes", "leave it out")
    if request.via != "sbatch":
        raise InputError(
            f"via: several recipes are a job array, which goes through sbatch, not {request.via}", "leave it out"
        )
    if not recipes:
        raise InputError("recipe: the list is empty", "give at least one recipe")
    if run := next((run for one in recipes if (run := run_named(one)) is not None), None):
        raise InputError(f"{run.path}: is a run, and a list is of recipes", "submit it by itself: run.submit()")
    request.check_via()
    return [plan_for(recipe, request) for recipe in recipes]


def _with_options(plan: Plan, request: JobRequest) -> Plan:
    """The plan with sbatch's options for this submission alone; the plan that the run keeps does not have them.

    Raises:
        InputError: an option that afina sets itself, or a run in `after` without a job.
    """
    options = {str(name).replace("_", "-"): value for name, value in request.slurm.items()}
    if jobs := [job for one in request.after if (job := _job_of(one)) is not None]:
        options["dependency"] = ",".join(filter(None, [options.get("dependency"), f"afterok:{':'.join(jobs)}"]))
    try:
        lines = (f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items())
        extra = sbatch_extra("\n".join(lines), "slurm")
    except SiteError as error:
        raise InputError(error.message, error.remedy) from None
    site = plan.site.model_copy(update={"sbatch_extra": (*plan.site.sbatch_extra, *extra)})
    return plan.model_copy(update={"site": site})


def _job_of(one: object) -> str | None:
    """The job to wait for: of a run its newest; None where it has finished."""
    run = run_named(one)
    if run is None:
        if str(one).replace("_", "").isdigit():
            return str(one)
        raise InputError(f"after: {one} is neither a run nor a job's number", "give runs, or numbers of jobs")
    if run.state == "FINISHED":
        return None
    if run.job_id is None:
        raise InputError(f"after: {run.path} has no job to wait for: it is {run.state}", "submit it to Slurm first")
    return run.job_id.partition(";")[0]


def plan_to_submit(recipe: AnyRecipe | Run, request: JobRequest) -> tuple[Plan, Run | None]:
    """The plan that `submit` submits: a new one, or a run's own, of which only the time limit can change.

    Raises:
        InputError: the request changes something else of a run.
    """
    request.check_via()
    handle = run_named(recipe)
    if handle is None:
        assert not isinstance(recipe, Run)
        return plan_for(recipe, on_this_machine(request) if request.via == "local" else request), None
    given = {
        "--set": request.overrides or None,
        "--run": request.run,
        "--site": request.site,
        "--nodes": request.nodes,
        "--gpus-per-node": request.gpus_per_node,
        "--rehearse": request.rehearse or None,
        "slurm": request.slurm or None,
        "after": request.after or None,
    }
    if named := [option for option, value in given.items() if value is not None]:
        raise InputError(
            f"{named[0]}: {handle.path} is a run, which continues as it was planned; only --time can change",
            "leave it out, or start another run from the recipe",
        )
    return handle.dir.plan().with_time(request.time_min), handle


def _attempt(directory: RunDir, env: dict[str, str], received: list[int] | None) -> None:
    folder = directory.begin_attempt()
    code = run_node(directory, folder.name, env=env, received=received)
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
    """Describe what `submit` would do with this plan: the run directory, the command, and with submitit its script. Changes nothing.

    Args:
        claimed: `path` is a run that is resumed.
    """
    run = RunDir(path) if path else next_free(plan)
    if not claimed:
        check_free(run.path)
    if via == "local":
        return {"run": str(run.path), "claimed": claimed, "command": background_argv(run.path, "local-1")}
    if via == "sbatch":
        return {"run": str(run.path), "claimed": claimed, "command": sbatch_argv(plan, run.path)}
    return {
        "run": str(run.path),
        "claimed": claimed,
        "command": ["sbatch", str(run.path / "submitit/<id>_submission.sh")],
        "script": submitit_script(plan, run),
    }
