"""The only module that runs sbatch, squeue, sacct, scancel, sinfo, scontrol and sacctmgr, or imports submitit.

Covers submission, states, cancelling, what accounting says, and what the cluster says of itself. A query that fails says `UNKNOWN`,
never `FAILED`: clusters without accounting have no sacct, and a busy slurmctld does not answer. Jobs of other users, and of other
clusters (`--clusters`), are not looked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from shlex import quote
from typing import Any, Literal

from afina.errors import SlurmError
from afina.run.commands import sbatch_argv, slurm_options
from afina.run.directory import RunDir
from afina.run.plan import Plan
from afina.run.requeue import conclude
from afina.run.supervise import run_node
from afina.slurm import cluster

__all__ = [
    "Job",
    "JobState",
    "NodeTask",
    "accounting",
    "ask_cluster",
    "cancel",
    "heard",
    "max_array_size",
    "need_slurm",
    "query",
    "submit_sbatch",
    "submit_script",
    "submit_submitit",
    "submitit_script",
    "version",
]

JobState = Literal["PENDING", "RUNNING", "GONE", "UNKNOWN"]

#: Slurm's states in which a job waits.
_WAITS = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "SUSPENDED",
    "STOPPED",
    "RESV_DEL_HOLD",
)
#: Those that a job does not leave by itself; what is in neither list runs (RUNNING, COMPLETING, SIGNALING, STAGE_OUT, …).
_ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
#: One argument of a command may have 131,072 bytes on Linux.
_LONGEST = 100_000
#: Seconds to wait for an answer about states: somebody looks at the screen.
_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Job:
    """What Slurm knows of a job.

    Attributes:
        job_id: as it was asked for: `123`, or `123_4` for a task of an array.
        state: PENDING, RUNNING, GONE (it has left the queue) or UNKNOWN (Slurm does not answer).
        said: Slurm's own word for the state, e.g. COMPLETING, TIMEOUT, CANCELLED; empty where it is not known.
        reason: why it waits, in Slurm's word; `afina.slurm.reasons` explains it.
        time_left_s: seconds to its time limit.
        start: when it started, or when Slurm thinks that it will, in seconds since the epoch.
        nodes: the nodes that it runs on, as Slurm abbreviates them.
    """

    job_id: str
    state: JobState
    said: str = ""
    reason: str = ""
    time_left_s: int | None = None
    start: float | None = None
    nodes: str = ""


def need_slurm() -> None:
    """Raises SlurmError where there is no Slurm to submit to."""
    _need("sbatch")


def submit_sbatch(plan: Plan, run: RunDir) -> str:
    """Submit through `slurm/finetune.sbatch`; returns the job id.

    Raises:
        SlurmError: no sbatch on PATH, or Slurm refused; with what it said.
    """
    argv = sbatch_argv(plan, run.path)
    job_id = submit_script(plan, argv)
    run.append("submissions.jsonl", {"job_id": job_id, "via": "sbatch", "argv": argv})
    return job_id


def max_array_size() -> int:
    """One more than the highest number that an array task may have here; Slurm's default where Slurm does not answer."""
    try:
        said = _slurm(["scontrol", "show", "config"])
    except SlurmError:
        return 1001
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.MULTILINE)
    return max(1, int(found[1])) if found else 1001


def submit_script(plan: Plan, argv: Sequence[str]) -> str:
    """Run `argv`, an `sbatch --parsable …`, in the plan's site; returns the job id.

    Raises:
        SlurmError: as `submit_sbatch`.
    """
    said = _slurm(argv, env=_environment(plan))
    job_id = (said.strip().splitlines() or [""])[-1].split(";")[0]
    if not job_id.isdigit():
        raise SlurmError(
            f"sbatch answered {said.strip()!r}, which is no job id", "look with `squeue --me` whether the job is there"
        )
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
    asked, omit = slurm_options(plan), plan.site.sbatch_omit
    options = {name.replace("-", "_"): value for name, value in asked.items()}
    known = executor._valid_parameters()
    ours = {name: value for name, value in (("requeue", True), ("signal", "B:USR1@120")) if name not in omit}
    cores = asked.get("cpus-per-task", "$SLURM_CPUS_PER_TASK")
    executor.update_parameters(
        **{name: value for name, value in options.items() if name in known},
        setup=_setup_lines(plan, run),
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={cores}"],
        additional_parameters={**ours, **{name: value for name, value in options.items() if name not in known}},
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
        *([f'{quote(sys.executable)} -m afina.run.image_check "$run" || exit 3'] if plan.site.image_key else []),
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


def query(job_ids: Collection[str], *, account: Collection[str] | None = None) -> dict[str, Job]:
    """What Slurm knows of each job: one call of squeue, and at most one of sacct for jobs that have left the queue.

    Args:
        job_ids: `123`, or `123_4` for a task of an array. An array's task is also found by the number of its own that it has
            while it runs (SLURM_JOB_ID).
        account: those whose end sacct is asked for; by default all. Without accounting their `said` stays empty.
    """
    if not job_ids:
        return {}
    # Times as seconds since the epoch: no time zone, no hour that comes twice.
    ask = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%A|%T|%L|%S|%N|%r"]
    try:
        said = _slurm(ask, env={"SLURM_TIME_FORMAT": "%s"}, timeout_s=_PATIENCE_S)
    except SlurmError:
        return {job_id: Job(job_id, "UNKNOWN") for job_id in job_ids}
    found: dict[str, Job] = {}
    for line in said.splitlines():
        fields = line.strip().split("|", 6)
        if len(fields) < 7:
            continue
        job_id, own, state, left, start, nodes, reason = fields
        job = Job(job_id, _state(state), state, reason, _seconds(left), _number(start), nodes)
        found[job_id] = job
        # Tasks of an array that have not begun share its number; the last one to begin keeps it as its own.
        found.setdefault(own, job)
    missing = [job_id for job_id in job_ids if job_id not in found]
    ended = _accounted([j for j in missing if account is None or j in account]) if missing else {}
    gone = {job_id: Job(job_id, "GONE", ended.get(job_id, "")) for job_id in missing}
    return {job_id: gone[job_id] if job_id in gone else found[job_id] for job_id in job_ids}


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


def _state(said: str) -> JobState:
    return "PENDING" if said in _WAITS else "GONE" if said in _ENDED else "RUNNING"


def _accounted(job_ids: Sequence[str]) -> dict[str, str]:
    """How jobs ended, as sacct says: COMPLETED, TIMEOUT, CANCELLED, …; empty where it says nothing."""
    ended: dict[str, str] = {}
    for part in _parts(job_ids):
        ask = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,JobIDRaw,State", f"--jobs={part}"]
        try:
            said = _slurm(ask, timeout_s=_PATIENCE_S)
        except SlurmError:
            return ended
        for line in said.splitlines():
            fields = line.split("|")
            if len(fields) == 3 and fields[2].split():
                state = fields[2].split()[0]  # `CANCELLED by 1000`
                ended[fields[0]] = state
                ended.setdefault(fields[1], state)
    return ended


def _parts(job_ids: Sequence[str]) -> Iterator[str]:
    """The ids, joined by commas, in pieces that fit into one argument: a thousand are one piece."""
    piece = ""
    for job_id in job_ids:
        if piece and len(piece) + len(job_id) >= _LONGEST:
            yield piece
            piece = ""
        piece = f"{piece},{job_id}" if piece else job_id
    if piece:
        yield piece


def _seconds(text: str) -> int | None:
    """`[D-]H:M:S` or `M:S` to seconds; None for UNLIMITED, INVALID, NOT_SET."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _number(text: str) -> float | None:
    return float(text) if text.strip().isdigit() else None


def cancel(*job_ids: str) -> None:
    """Cancel jobs by one call of scancel; one that has ended meanwhile is no error.

    Raises:
        SlurmError: Slurm refused.
    """
    if job_ids:
        _slurm(["scancel", *job_ids])


def heard(argv: Sequence[str], *, timeout_s: float = 20.0, env: Mapping[str, str] | None = None) -> str | None:
    """What one of Slurm's commands answers; None where it is missing, refuses or is silent. For what can be done without."""
    try:
        return _slurm(argv, env, timeout_s)
    except (SlurmError, OSError):
        return None


def ask_cluster(*, accounting: bool = True) -> cluster.Cluster:
    """What the cluster says of itself: four short commands; what one does not answer is left empty.

    Args:
        accounting: also ask for this user's accounts and for the QOS, where a cluster has accounting.
    """
    partitions = cluster.parse_partitions(heard(cluster.SINFO_ARGV) or "")
    if not partitions:
        return cluster.Cluster()
    config = cluster.parse_config(heard(["scontrol", "show", "config"]) or "")
    if not accounting:
        return cluster.Cluster(partitions, config)
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
    said = heard([*cluster.ASSOC_ARGV, f"user={user}"]) or ""
    associations = cluster.parse_associations(said, config.get("ClusterName"))
    return cluster.Cluster(partitions, config, associations, cluster.parse_qos(heard(cluster.QOS_ARGV) or ""))


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


def _slurm(argv: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> str:
    _need(argv[0])
    # Called in a task of an array, sbatch would pass its number on to a job that is none (22.05.8).
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_ARRAY_")}
    try:
        done = subprocess.run(
            list(argv),
            env={**own, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            start_new_session=True,  # Ctrl-C is for afina: it writes down first what Slurm took
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{argv[0]} did not answer for {timeout_s:.0f} s", "slurmctld may be busy; try again"
        ) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        remedy = (
            _remedy(said) if argv[0] == "sbatch" else "try again; `squeue --me` shows what Slurm knows of your jobs"
        )
        raise SlurmError(f"{argv[0]} refused: {said}", remedy)
    return done.stdout


def _remedy(said: str) -> str:
    lower = said.lower()
    for words, remedy in {
        "submit limit": "fewer jobs at once: wait for some to end, then the same command again; `sacctmgr show qos` shows the limits",
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
