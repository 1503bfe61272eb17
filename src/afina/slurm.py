"""The only module that runs sbatch, squeue, sacct and scancel, or imports submitit.

Covers submission, states and cancelling. A query that fails says `UNKNOWN`, never `FAILED`: clusters without accounting have no
sacct, and a busy slurmctld does not answer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from afina.errors import SlurmError
from afina.launch import batch_script, sbatch_argv, slurm_options
from afina.plan import Plan
from afina.rundir import RunDir
from afina.supervise import run_node, settle

__all__ = [
    "JobState",
    "NodeTask",
    "cancel",
    "in_queue",
    "need_slurm",
    "sbatch_request",
    "submit_sbatch",
    "submit_submitit",
    "submitit_script",
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


def sbatch_request(plan: Plan, run: RunDir, *, wait: bool = False) -> list[str]:
    """The exact command that submits `run`; the dry run prints it."""
    return sbatch_argv(plan, run.path, batch_script(), wait=wait)


def submit_sbatch(plan: Plan, run: RunDir) -> str:
    """Submit through `slurm/finetune.sbatch`; returns the job id.

    Raises:
        SlurmError: no sbatch on PATH, or Slurm refused; with what it said.
    """
    argv = sbatch_request(plan, run)
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
        return settle(run, attempt, code).model_dump()


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
    """Bash in front of submitit's srun: the site, the meeting point, and a shell that hears Slurm while srun runs.

    submitit sends its signal to every process of the step, which would kill the image's FUSE mount; here the batch shell
    hears it instead. bash runs a trap only between commands or in `wait`, so srun goes to the background.
    """
    from shlex import quote

    site = [f"set -a; . {quote(str(plan.site.file))}; set +a"] if plan.site.file else []
    return [
        *site,
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        """address=$(scontrol show node "$head" --oneliner | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)""",
        'export AFINA_HEAD="${address:-$head}"',
        "port=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_ARRAY_TASK_ID:-0}) % 20000))",
        'while (exec 3<>"/dev/tcp/$AFINA_HEAD/$port") 2>/dev/null; do port=$((port + 1)); done',
        "export AFINA_PORT=$port",
        f"stop={quote(str(run.stop_file))}; limit=0",
        """trap 'limit=1; touch "$stop"' USR1""",
        """trap 'touch "$stop"' TERM""",
        "srun() {",
        '  command srun "$@" & local step=$! code',
        '  while :; do wait "$step"; code=$?; kill -0 "$step" 2>/dev/null || break; done',
        f'  if [ "$limit" = 1 ] && [ "$(cat {quote(str(run.attempts))}/"$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}/exit")" = 75 ]; then',
        '    scontrol requeue "$SLURM_JOB_ID" && sleep 60',
        "  fi",
        '  return "$code"',
        "}",
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
