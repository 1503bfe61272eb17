"""The Python API: recipe in, run out. Composes recipe, site, plan, run directory, launch and Slurm.

afina.submit("recipe.yaml", nodes=2).result()
afina.train("recipe.yaml", overrides=["train.epochs=1"])
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from afina import errors
from afina.errors import AfinaError, EnvironmentProblem, InputError, TrainingError
from afina.image import check_image
from afina.launch import job_scripts, node_argv, sbatch_argv, worker_argv, worker_environment
from afina.plan import Plan, check_cores, geometry_for, make_plan
from afina.recipe import Recipe, load_recipe
from afina.record import make_record
from afina.rundir import Outcome, RunDir, is_run_dir
from afina.site import environment, load_site
from afina.slurm import cancel, in_queue, need_slurm, submit_sbatch, submit_submitit, submitit_script
from afina.supervise import run_node, settle

__all__ = ["Run", "State", "claim", "dry_run", "plan_for", "prepare", "resume", "submit", "train", "visible_gpus"]

State = Literal["PLANNED", "PENDING", "RUNNING", "FINISHED", "STOPPED", "FAILED", "UNKNOWN"]
Via = Literal["sbatch", "submitit"]


class Run:
    """A handle on a run directory; all it knows it reads there and, for what is queued, from squeue."""

    def __init__(self, path: str | Path) -> None:
        if not is_run_dir(path):
            raise InputError(
                f"{path}: not a run directory", "give the folder that `afina train` or `afina submit` named"
            )
        self.dir = RunDir(path)

    def __repr__(self) -> str:
        return f"Run({str(self.dir.path)!r})"

    @property
    def path(self) -> Path:
        return self.dir.path

    @property
    def job_id(self) -> str | None:
        """The last Slurm job that was submitted for it."""
        ids = [str(s["job_id"]) for s in self.dir.lines("submissions.jsonl")]
        return ids[-1] if ids else None

    @property
    def outcome(self) -> Outcome | None:
        return self.dir.outcome()

    @property
    def state(self) -> State:
        """PLANNED, PENDING, RUNNING, FINISHED, STOPPED, FAILED; UNKNOWN where Slurm does not answer."""
        outcome, job = self.outcome, self.job_id
        if outcome is not None and outcome.outcome == "finished":
            return "FINISHED"
        recorded: State | None = None if outcome is None else ("STOPPED" if outcome.outcome == "stopped" else "FAILED")
        if job is None:
            return recorded or ("UNKNOWN" if self.dir.attempt_names() else "PLANNED")
        queued = in_queue([job])[job]
        if queued == "UNKNOWN":
            return recorded or "UNKNOWN"
        if queued != "GONE":
            return queued
        return recorded or "FAILED"

    def wait(self, timeout_s: float | None = None) -> State:
        """Block until the run is neither queued nor running; returns its state.

        Works without accounting: the truth is the run directory, and squeue for whether the job is still there.

        Raises:
            TimeoutError: after `timeout_s` seconds.
        """
        began, pause = time.monotonic(), 0.5
        while True:
            state = self.state
            if state not in ("PENDING", "RUNNING", "UNKNOWN"):
                if state != "FAILED" or self.outcome is not None:
                    return state
                # Gone from the queue without an outcome: a shared file system may show the file a little later.
                time.sleep(5)
                return self.state
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise TimeoutError(f"{self.path}: still {state} after {timeout_s:g} s")
            time.sleep(pause)
            pause = min(15.0, pause * 1.3)

    def result(self, timeout_s: float | None = None) -> Outcome:
        """Wait, and return the outcome of a finished run.

        Raises:
            TrainingError: the run stopped or failed; with the recorded cause.
        """
        state = self.wait(timeout_s)
        outcome = self.outcome
        if state == "FINISHED" and outcome is not None:
            return outcome
        if state == "PLANNED":
            raise InputError(f"{self.path}: was never submitted", f"afina submit '{self.path}'")
        cause = outcome.error if outcome and outcome.error else "its job left the queue without an outcome"
        raise TrainingError(
            f"{self.path}: {state}: {cause}", f"afina resume '{self.path}' continues from the newest checkpoint"
        )

    def metrics(self) -> list[dict[str, Any]]:
        return self.dir.metrics()

    def cancel(self) -> None:
        """Cancel the queued or running job."""
        if self.job_id:
            cancel(self.job_id)


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
        **_hub_token(here),
        **({"AFINA_REFRESH": "1"} if refresh else {}),
    }
    argv = worker_argv(plan, "prepare", "--json")
    try:
        worker = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True)
    except OSError as error:
        raise EnvironmentProblem(
            f"{argv[0]}: {error.strerror}",
            "install Apptainer, or load its module in site.env (AFINA_RUNTIME=none runs without)",
        ) from None
    try:
        out, _ = worker.communicate(plan.to_json().encode())
    except BaseException:
        os.killpg(worker.pid, signal.SIGTERM)
        try:
            worker.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
        raise
    lines = out.decode(errors="replace").strip().splitlines()
    try:
        said = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise EnvironmentProblem(
            f"the prepare stage ended with {worker.returncode} and said nothing", "see the lines above"
        ) from None
    if "error" in said:
        kind = getattr(errors, str(said["error"]), AfinaError)
        raise kind(said["message"], said["remedy"])
    assert isinstance(said, dict)
    return said


def _hub_token(env: Mapping[str, str]) -> dict[str, str]:
    """The token that `hf auth login` left in the home, which the container does not see and the caches have moved from."""
    if env.get("HF_TOKEN"):
        return {}
    home = Path(env.get("HF_HOME") or Path(env.get("HOME", "/")) / ".cache/huggingface")
    try:
        return {"HF_TOKEN": Path(env.get("HF_TOKEN_PATH") or home / "token").read_text().strip()}
    except OSError:
        return {}


def claim(plan: Plan, path: str | Path | None = None, *, text: str | None = None) -> RunDir:
    """Prepare, then claim a run directory: bad data leaves nothing behind.

    Args:
        text: the recipe's text, where it is not what the plan's recipe file holds now.
    """
    RunDir.check_free(path)
    check_image(plan.site)
    prepared = prepare(plan)
    argv = node_argv(plan, _extra_binds(plan, path))
    if text is None:
        text = (
            plan.recipe_file.read_text(encoding="utf-8")
            if plan.recipe_file
            else json.dumps(plan.recipe.model_dump(mode="json"), indent=2)
        )
    record = make_record(plan, prepared, text)
    return RunDir.claim(plan, prepared, argv, text, path, scripts=job_scripts(), record=record)


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
) -> Run:
    """Prepare, claim and submit to Slurm; returns at once. `recipe` may be a run directory: it is submitted again.

    Raises:
        AfinaError: what would have failed in the queue is refused here.
    """

    need_slurm()
    handle = None if isinstance(recipe, Recipe) or not is_run_dir(recipe) else Run(recipe)
    if handle is not None:
        directory, plan = handle.dir, handle.dir.plan()
        if handle.state in ("PENDING", "RUNNING", "FINISHED"):
            raise InputError(f"{recipe}: this run is {handle.state}", "nothing to submit")
        check_image(plan.site)
    else:
        plan = plan_for(
            recipe, overrides=overrides, site=site, nodes=nodes, gpus_per_node=gpus_per_node, time_min=time_min
        )
        directory = claim(plan, run)
    try:
        (submit_sbatch if via == "sbatch" else submit_submitit)(plan, directory)
    except AfinaError:
        if handle is None:  # claimed a moment ago, for this submission
            shutil.rmtree(directory.path)
        raise
    return Run(directory.path)


def _attempt(directory: RunDir, env: dict[str, str]) -> None:
    folder = directory.begin_attempt()
    site = environment(directory.plan().site)
    code = run_node(directory, folder.name, env={**site, "AFINA_LAUNCH": "local", **env})
    outcome = settle(directory, folder.name, code)
    recorded = directory.outcome()
    if recorded is None or recorded.attempt != folder.name:
        # Another attempt works there, or the disk is full: what the directory says is not about this attempt.
        kind = {2: InputError, 3: EnvironmentProblem}.get(outcome.exit_code, TrainingError)
        raise kind(*(outcome.error or "").split("\n  remedy: ", 1))


def visible_gpus() -> int:
    """GPUs this process may use, without importing torch: CUDA_VISIBLE_DEVICES, else the driver's list. Not measured on a GPU."""
    if not Path("/proc/driver/nvidia/version").exists():
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def dry_run(plan: Plan, via: Via, path: str | Path | None = None) -> dict[str, Any]:
    """What `submit` would do with this plan: the run directory, the command, and with submitit its script. Changes nothing."""
    run = RunDir(path) if path else RunDir.next_free(plan)
    RunDir.check_free(run.path)
    if via == "sbatch":
        return {"run": str(run.path), "command": sbatch_argv(plan, run.path)}
    return {
        "run": str(run.path),
        "command": ["sbatch", str(run.path / "submitit/<id>_submission.sh")],
        "script": submitit_script(plan, run),
    }
