"""Run a Slurm command: its answer, or an error with a remedy.

Its environment is this process's without the variables that would change what it asks or prints (`slurm_environment`).

Not covered: Slurm's REST interface.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from afina.errors import SlurmError
from afina.processes import run_captured
from afina.site.variables import UNWANTED_SBATCH
from afina.slurm.reasons import explain

__all__ = [
    "AMBIGUOUS",
    "SUBMIT_LIMIT",
    "need_command",
    "need_slurm",
    "of_cluster",
    "run_command",
    "slurm_environment",
    "try_command",
    "version",
]

#: The cause of an error after which a job may be in the queue all the same.
AMBIGUOUS = "ambiguous"

#: The cause of a refusal because of how many jobs may be queued: fewer at once may be taken.
SUBMIT_LIMIT = "submit-limit"

#: Variables that Slurm's commands obey. Those of a surrounding job or salloc would pin, bind or narrow a new job (sbatch passes
#: them on, srun obeys them there); SQUEUE_* and the like filter or reformat what we ask. SALLOC_* and SRUN_* are not read by them.
_OBEYED = re.compile("(SLURM|SLURMD|SQUEUE|SINFO|SACCT|SACCTMGR|SCANCEL|SSHARE|SPRIO|SSTAT)_")
#: These reach Slurm: its configuration, its credentials, and the cluster that the user chose for new jobs.
_REACH = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
_LOST_ANSWER = re.compile("timed out|unable to contact|connection|communication|zero bytes|unexpected message", re.I)

#: What sbatch's refusal contains (lower case, the first that fits) -> what to do.
_REMEDIES = (
    (
        "accounting/qos policy",
        "ask for less time, fewer nodes or GPUs, or wait for some of your jobs to end; "
        "`sacctmgr show qos format=name,maxwall,maxtrespu,maxsubmitpu` shows the limits",
    ),
    ("account", "set SBATCH_ACCOUNT in site.env; `sacctmgr show assoc user=$USER` lists yours"),
    ("partition", "set SBATCH_PARTITION in site.env; `sinfo -s` lists the partitions"),
    ("qos", "set SBATCH_QOS in site.env"),
    ("time limit", "ask for less time: --time"),
    (
        "node configuration",
        "ask for fewer GPUs, cores or memory per node; `sinfo -o '%P %D %c %m %G'` shows what nodes have",
    ),
    ("gres", "`sinfo -o '%P %G'` shows the GPUs there are; --gpus-per-node 0 runs on the CPU"),
    ("", "check site.env and the recipe's resources"),
)


def slurm_environment(command: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for one of Slurm's commands.

    Args:
        more: variables beside it; they are not filtered.
    """
    keep = (*_REACH, "SLURM_CLUSTERS") if command == "sbatch" else _REACH
    own = {
        name: value
        for name, value in os.environ.items()
        if (name in keep or not _OBEYED.match(name)) and name not in UNWANTED_SBATCH
    }
    return {**own, **(more or {})}


def of_cluster(job_id: str) -> tuple[str, list[str]]:
    """A job as `sbatch --parsable` names it (`18`, or `18;gpu` on another cluster): its number, and Slurm's option for its cluster."""
    number, _, cluster = job_id.partition(";")
    return number, [f"--clusters={cluster}"] if cluster else []


def run_command(argv: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> str:
    """Run one of Slurm's commands; returns its standard output.

    Args:
        env: variables beside those of this process.

    Raises:
        SlurmError: the command is missing, refused or did not answer in time. With the cause `AMBIGUOUS` its request may have been
            carried out: the answer was lost.
    """
    need_command(argv[0])
    try:
        # Ctrl-C must reach afina alone: it records the job before it exits.
        done = run_captured(argv, slurm_environment(argv[0], env), timeout_s, new_session=True)
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{argv[0]} did not answer for {timeout_s:.0f} s", "slurmctld may be busy; try again", cause=AMBIGUOUS
        ) from None
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        lost = done.returncode < 0 or _LOST_ANSWER.search(reason)
        limit = re.search(r"\b(QOS|Assoc)\w*Submit", reason)
        cause = AMBIGUOUS if lost else SUBMIT_LIMIT if limit else ""
        raise SlurmError(f"{argv[0]} refused: {reason}", _remedy(argv[0], reason), cause=cause)
    return done.stdout


def try_command(argv: Sequence[str], *, timeout_s: float = 20.0, env: Mapping[str, str] | None = None) -> str | None:
    """As `run_command`; None where the command is missing, refuses or does not answer."""
    try:
        return run_command(argv, env, timeout_s)
    except (SlurmError, OSError):
        return None


def need_command(command: str) -> None:
    """Raises SlurmError: the command is not on PATH."""
    if shutil.which(command) is None:
        raise SlurmError(
            f"{command} is not on PATH: no Slurm here",
            "run this on a login node of the cluster (`module load slurm`?), or train here with `afina train`",
        )


def need_slurm() -> None:
    """Raises SlurmError: there is no Slurm to submit to."""
    need_command("sbatch")


def version() -> str | None:
    """Slurm's version as it names itself, e.g. `slurm 23.11.4`; None without Slurm."""
    return (try_command(["sbatch", "--version"]) or "").strip() or None


def _remedy(command: str, reason: str) -> str:
    if command != "sbatch":
        return "try again; `squeue --me` shows what Slurm knows of your jobs"
    # The limit by its name, which newer versions of Slurm print before the sentence that is the same for all limits.
    named = re.search(r"\b(QOS|Assoc)[A-Z][A-Za-z]+\b", reason)
    if named and "Submit" in named[0]:
        return "wait for some of your jobs to end, then repeat the command; `sacctmgr show qos` shows the limits"
    if named:
        waiting = explain(named[0], "")
        return f"{waiting.words}: {waiting.refused or waiting.remedy}"
    return next(remedy for words, remedy in _REMEDIES if words in reason.lower())
