"""Submit through submitit: the same batch script as through sbatch; submitit is the way in and the handle.

submitit's own script only begins like one of its own: it sources `finetune.sbatch` of the run directory, which trains, requeues
and ends the job. What comes next and the job's exit code are therefore the same as through sbatch. Before the job ends, submitit's
task runs once in the batch shell, so that `submitit.Job.result()` returns the outcome.
"""

from __future__ import annotations

import re
import secrets
import sys
from shlex import quote
from typing import Any

from afina.errors import EnvironmentProblem
from afina.run.commands import plain_path, slurm_options
from afina.run.directory import RunDir
from afina.run.plan import Plan
from afina.slurm.client import need_command
from afina.slurm.submit import submitted

__all__ = ["NodeTask", "submit_submitit", "submitit_script"]


#: Tried: 1.4 and 1.5.1 lack arguments that are used here, 1.5.2 and 1.5.3 import pkg_resources in the job.
_LOWEST = (1, 5, 4)


class NodeTask:
    """The callable that submitit pickles; its result is the run's outcome. Runs of an older afina name it too."""

    def __init__(self, run: str) -> None:
        self.run = run

    def __call__(self) -> dict[str, Any] | None:
        outcome = RunDir(self.run).outcome()
        return outcome.model_dump() if outcome else None


def submit_submitit(plan: Plan, run: RunDir) -> str:
    """Submit a run through submitit; returns the job id.

    Raises:
        SlurmError: as `afina.slurm.submit.submit_sbatch`.
    """
    (run.path / "submitit").mkdir(mode=0o700, exist_ok=True)  # pickles in it are executed
    return str(_executor(plan, run).submit(NodeTask(str(run.path))).job_id)


def submitit_script(plan: Plan, run: RunDir) -> str:
    """The batch script that submitit would submit; the dry run prints it."""
    executor = _executor(plan, run)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def _executor(plan: Plan, run: RunDir) -> Any:
    import submitit

    if tuple(map(int, re.findall(r"\d+", submitit.__version__)[:3])) < _LOWEST:
        raise EnvironmentProblem(
            f"submitit {submitit.__version__}: its jobs fail where setuptools is missing or new (pkg_resources)",
            f"{quote(sys.executable)} -m pip install 'submitit>={'.'.join(map(str, _LOWEST))}', or via=\"sbatch\"",
        )
    need_command("sbatch")
    need_command("srun")  # submitit asks for it

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
        """Submits as afina does: recorded, found again if the answer is lost, with the site's variables for sbatch alone."""

        def _submit_command(self, command: str) -> Any:
            name = secrets.token_hex(16)
            script = self.folder / f".submission_file_{name}.sh"
            script.write_text(self._make_submission_file_text(command, name), encoding="utf-8")
            # On the command line: in a script Slurm would read quotes and backslashes in it once more.
            argv = ["sbatch", "--parsable", f"--output={plain_path(self.folder)}/%j_0_log.out", str(script)]
            with submitted(plan, argv, {run.path: {}}) as job_id:
                run.append("submissions.jsonl", {"job_id": job_id, "via": "submitit"})
            job = self.job_class(folder=self.folder, job_id=job_id.partition(";")[0], tasks=[0])
            job.paths.move_temporary_file(script, "submission_file", keep_as_symlink=True)
            self._write_job_id(job.job_id, name)
            self._set_job_permissions(job.paths.folder)
            return job

    executor = Executor(folder=run.path / "submitit", max_num_timeout=1_000_000)
    requested, omit = slurm_options(plan), plan.site.sbatch_omit
    options = {name.replace("-", "_"): value for name, value in requested.items()}
    known = executor._valid_parameters()
    ours = {name: value for name, value in (("requeue", True), ("signal", "B:USR1@120")) if name not in omit}
    executor.update_parameters(
        **{name: value for name, value in options.items() if name in known},
        setup=_setup_lines(plan, run),
        additional_parameters={
            **ours,
            **{name: value for name, value in options.items() if name not in known},
        },
        use_srun=False,
        stderr_to_stdout=True,
        wckey=None,  # submitit sets its own, which clusters without such keys refuse
    )
    return executor


def _setup_lines(plan: Plan, run: RunDir) -> list[str]:
    """Bash before submitit's own command, which is not reached: `finetune.sbatch` ends the job."""
    result = f"{quote(sys.executable)} -u -m submitit.core._submit {quote(str(run.path / 'submitit'))}"
    return [
        "afina_result() { # for submitit.Job.result(); a job that is requeued has none yet",
        "  local code=$?",
        '  [ "$(head -n 1 "$run/attempts/${AFINA_ATTEMPT:-}/next" 2>/dev/null)" = requeue ] ||',
        f"    PYTHONSAFEPATH=1 SUBMITIT_EXECUTOR=slurm {result} >/dev/null 2>&1 </dev/null",
        '  exit "$code"',
        "}",
        "trap afina_result EXIT",
        f". {quote(str(run.path / 'finetune.sbatch'))} {quote(str(run.path))}",
        "exit 3 # it ends the job itself, if it can be read",
    ]
