"""The only module that runs sbatch, squeue, sacct and scancel, or imports submitit.

Covers submission, states, cancelling and what accounting says. A query that fails says `UNKNOWN`, never `FAILED`: clusters without accounting have no
sacct, and a busy slurmctld does not answer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from shlex import quote
from typing import Any, Literal

from afina.errors import SlurmError
from afina.launch import sbatch_argv, slurm_options
from afina.plan import Plan
from afina.requeue import conclude
from afina.rundir import RunDir
from afina.supervise import run_node

__all__ = [
    "JobState",
    "NodeTask",
    "accounting",
    "cancel",
    "in_queue",
    "need_slurm",
    "submit_sbatch",
    "submit_submitit",
    "submitit_script",
    "version",
]

JobState = Literal["PENDING", "RUNNING", "GONE", "UNKNOWN"]

_QUEUED = {
    "PENDING": "PENDING",
    "CONFIGURING": "PENDING",
    "REQUEUED": "PENDING",
    "REQUEUE_HOLD": "PENDING",
    "SUSPENDED": "PENDING",
}


def need_slurm() -> None:
    """Raises SlurmError where there is no Slurm to submit to."""
    _need("sbatch")


def submit_sbatch(plan: Plan, run: RunDir) -> str:
    """Submit through `slurm/finetune.sbatch`; returns the job id.

    Raises:
        SlurmError: no sbatch on PATH, or Slurm refused; with what it said.
    """
    argv = sbatch_argv(plan, run.path)
    said = _slurm(argv, env=_environment(plan))
    job_id = (said.strip().splitlines() or [""])[-1].split(";")[0]
    if not job_id.isdigit():
        raise SlurmError(
            f"sbatch answered {said.strip()!r}, which is no job id", "look with `squeue --me` whether the job is there"
        )
    run.append("submissions.jsonl", {"job_id": job_id, "via": "sbatch", "argv": argv})
    return job_id


class NodeTask:
    """What submitit pickles and calls once per node: the host's supervisor of one run directory, and nothing else.

    It runs in the host's Python, so that Slurm's commands are at hand; the container is its child.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def __call__(self) -> dict[str, Any] | None:
        run = RunDir(self.run)
        attempt = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        node = int(os.environ.get("SLURM_NODEID", "0"))
        code = run_node(run, attempt, env={"AFINA_LAUNCH": "slurm"}, node=node, show=node == 0)
        if node:
            return None
        return conclude(run, attempt, code).model_dump()


def _submitit_executor(plan: Plan, run: RunDir) -> Any:
    import submitit

    _need("sbatch")
    _need("srun")
    folder = run.path / "submitit"
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=1_000_000)
    options = {name.replace("-", "_"): value for name, value in slurm_options(plan).items()}
    executor.update_parameters(
        **options,
        setup=_setup_lines(plan, run),
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={options['cpus_per_task']}"],
        additional_parameters={"requeue": True, "signal": "B:USR1@120"},
        stderr_to_stdout=True,
        wckey=None,  # submitit names one of its own, which clusters without such keys refuse
    )
    return executor


def _setup_lines(plan: Plan, run: RunDir) -> list[str]:
    """Bash in front of submitit's srun: the site, and a shell that hears Slurm while srun runs (`slurm/job.sh`).

    submitit sends its signal to every process of the step, which would kill the image's FUSE mount; here the batch shell
    hears it instead.
    """
    site = [f"set -a; . {quote(str(plan.site.file))}; set +a"] if plan.site.file else []
    return [
        *site,
        f"run={quote(str(run.path))}",
        *([f'{quote(sys.executable)} -m afina.image "$run" || exit 3'] if plan.site.image_key else []),
        '. "$run/job.sh" || exit 3',
        "afina_meet",
        'srun() { afina_step "$@"; [ "$code" = 0 ] || afina_after; return "$code"; }',
    ]


def submitit_script(plan: Plan, run: RunDir) -> str:
    """The batch script that submitit would submit; the dry run prints it."""
    executor = _submitit_executor(plan, run)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def submit_submitit(plan: Plan, run: RunDir) -> str:
    """Submit the same run through submitit; returns the job id.

    Raises:
        SlurmError: as `submit_sbatch`.
    """
    import submitit

    (run.path / "submitit").mkdir(mode=0o700, exist_ok=True)  # pickles in it are executed
    executor = _submitit_executor(plan, run)
    with _set(_environment(plan)):
        try:
            job = executor.submit(NodeTask(str(run.path)))
        except (
            submitit.core.utils.FailedJobError,
            submitit.core.utils.FailedSubmissionError,
            subprocess.CalledProcessError,
        ) as error:
            raise SlurmError(
                f"submitit could not submit: {str(error).strip()}",
                "see what sbatch said above; check site.env and the recipe's resources",
            ) from None
    run.append("submissions.jsonl", {"job_id": job.job_id, "via": "submitit"})
    return str(job.job_id)


def in_queue(job_ids: Sequence[str]) -> dict[str, JobState]:
    """State of each job by one call of squeue: PENDING, RUNNING, GONE (not in the queue any more), or UNKNOWN."""
    if not job_ids:
        return {}
    try:
        said = _slurm(["squeue", "--noheader", "--format=%i %T", "--me"])
    except SlurmError:
        return dict.fromkeys(job_ids, "UNKNOWN")
    found = dict(line.split(maxsplit=1) for line in said.splitlines() if " " in line.strip())
    states: dict[str, JobState] = {}
    for job in job_ids:
        state = found.get(job)
        states[job] = "GONE" if state is None else ("PENDING" if state in _QUEUED else "RUNNING")
    return states


def accounting(job_ids: Sequence[str], fields: Sequence[str]) -> list[dict[str, str]] | None:
    """Rows of sacct about these jobs and their steps, one more for each restart; None where there is no accounting."""
    if not job_ids:
        return None
    what = [f"--format={','.join(fields)}", f"--jobs={','.join(job_ids)}"]
    try:
        said = _slurm(["sacct", "--duplicates", "--noheader", "--parsable2", *what])
    except SlurmError:
        return None
    rows = [line.split("|") for line in said.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def version() -> str | None:
    """What Slurm says it is, e.g. `slurm 23.11.4`, or None where there is none."""
    try:
        return _slurm(["sbatch", "--version"]).strip() or None
    except SlurmError:
        return None


def cancel(job_id: str) -> None:
    """Cancel a job.

    Raises:
        SlurmError: Slurm refused.
    """
    _slurm(["scancel", job_id])


def _environment(plan: Plan) -> dict[str, str]:
    """What sbatch gets besides the caller's environment: the site, so that the job reads the same one."""
    site = plan.site
    given = {"AFINA_SCRATCH": str(site.scratch), **site.sbatch}
    if site.file:
        given["AFINA_SITE"] = str(site.file)
    if site.image:
        given["AFINA_IMAGE"] = str(site.image)
    return given


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
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


def _need(command: str) -> None:
    if shutil.which(command) is None:
        raise SlurmError(
            f"{command} is not on PATH: no Slurm here",
            "run this on a login node of the cluster (`module load slurm`?), or train here with `afina train`",
        )


def _slurm(argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    _need(argv[0])
    try:
        done = subprocess.run(
            list(argv), env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{argv[0]} did not answer for 120 s", "slurmctld may be busy; try again") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise SlurmError(f"{argv[0]} refused: {said}", _remedy(said))
    return done.stdout


def _remedy(said: str) -> str:
    lower = said.lower()
    for words, remedy in {
        "account": "set SBATCH_ACCOUNT in site.env; `sacctmgr show assoc user=$USER` lists yours",
        "partition": "set SBATCH_PARTITION in site.env; `sinfo -s` lists the partitions",
        "qos": "set SBATCH_QOS in site.env",
        "time limit": "ask for less time: --time",
        "node configuration": "ask for fewer GPUs, cores or memory per node; `sinfo -o '%P %D %c %m %G'` shows what there is",
        "gres": "`sinfo -o '%P %G'` shows the GPUs there are; --gpus-per-node 0 runs on the CPU",
    }.items():
        if words in lower:
            return remedy
    return "check site.env and the recipe's resources"
