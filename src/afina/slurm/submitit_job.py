"""Submit through submitit: the same run directory, supervised by the same host code.

submitit signals every process of the step, which would kill the image's FUSE mount; here the batch shell takes the signal
instead (`slurm/job.sh`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from shlex import quote
from typing import Any

from afina.errors import SlurmError
from afina.run.allocation import Allocation
from afina.run.commands import slurm_options
from afina.run.directory import RunDir
from afina.run.plan import Plan
from afina.run.requeue import finish_attempt
from afina.run.supervise import run_node
from afina.slurm.client import need_command
from afina.slurm.submit import site_variables

__all__ = ["NodeTask", "submit_submitit", "submitit_script"]


class NodeTask:
    """The callable that submitit pickles and calls once per node: supervise one run directory.

    It runs in the host's Python, where Slurm's commands are available; the container is its child.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def __call__(self) -> dict[str, Any] | None:
        run = RunDir(self.run)
        allocation = Allocation.from_env()
        attempt, node = allocation.attempt_of_job, allocation.node
        code = run_node(run, attempt, env={"AFINA_LAUNCH": "slurm"}, node=node, show=node == 0)
        if node:
            return None
        return finish_attempt(run, attempt, code).model_dump()


def submit_submitit(plan: Plan, run: RunDir) -> str:
    """Submit a run through submitit; returns the job id.

    Raises:
        SlurmError: no sbatch or srun on PATH, or Slurm refused; with its own message.
    """
    import submitit

    (run.path / "submitit").mkdir(mode=0o700, exist_ok=True)  # pickles in it are executed
    executor = _executor(plan, run)
    with _environment(site_variables(plan)):
        try:
            job = executor.submit(NodeTask(str(run.path)))
        except (
            submitit.core.utils.FailedJobError,
            submitit.core.utils.FailedSubmissionError,
            subprocess.CalledProcessError,
        ) as error:
            raise SlurmError(
                f"submitit could not submit: {str(error).strip()}",
                "see sbatch's message above; check site.env and the recipe's resources",
            ) from None
    run.append("submissions.jsonl", {"job_id": job.job_id, "via": "submitit"})
    return str(job.job_id)


def submitit_script(plan: Plan, run: RunDir) -> str:
    """The batch script that submitit would submit; the dry run prints it."""
    executor = _executor(plan, run)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def _executor(plan: Plan, run: RunDir) -> Any:
    import submitit

    need_command("sbatch")
    need_command("srun")
    executor = submitit.SlurmExecutor(folder=run.path / "submitit", max_num_timeout=1_000_000)
    requested, omit = slurm_options(plan), plan.site.sbatch_omit
    options = {name.replace("-", "_"): value for name, value in requested.items()}
    known = executor._valid_parameters()
    ours = {name: value for name, value in (("requeue", True), ("signal", "B:USR1@120")) if name not in omit}
    cores = requested.get("cpus-per-task", "$SLURM_CPUS_PER_TASK")
    executor.update_parameters(
        **{name: value for name, value in options.items() if name in known},
        setup=_setup_lines(plan, run),
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={cores}"],
        additional_parameters={**ours, **{name: value for name, value in options.items() if name not in known}},
        stderr_to_stdout=True,
        wckey=None,  # submitit sets its own, which clusters without such keys refuse
    )
    return executor


def _setup_lines(plan: Plan, run: RunDir) -> list[str]:
    """Bash before submitit's srun: load the site, and catch Slurm's signals while srun runs (`slurm/job.sh`)."""
    site = [f"set -a; . {quote(str(plan.site.file))}; set +a"] if plan.site.file else []
    return [
        *site,
        f"run={quote(str(run.path))}",
        *([f'{quote(sys.executable)} -m afina.run.image_check "$run" || exit 3'] if plan.site.image_key else []),
        '. "$run/job.sh" || exit 3',
        "afina_meet",
        'srun() { afina_step "$@"; [ "$code" = 0 ] || afina_after; return "$code"; }',
    ]


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process for the block: submitit runs sbatch with its own environment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
