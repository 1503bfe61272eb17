"""Run a Slurm command: its answer, or an error with a remedy.

Not covered: other clusters (`--clusters`), and Slurm's REST interface.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from afina.errors import SlurmError

__all__ = ["need_command", "need_slurm", "run_command", "try_command", "version"]

#: What sbatch's refusal contains (lower case, the first that fits) -> what to do.
_REMEDIES = (
    (
        "submit limit",
        "wait for some of your jobs to end, then repeat the command; `sacctmgr show qos` shows the limits",
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


def run_command(argv: Sequence[str], env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> str:
    """Run one of Slurm's commands; returns its standard output.

    Args:
        env: variables beside those of this process.

    Raises:
        SlurmError: the command is missing, refused or did not answer in time.
    """
    need_command(argv[0])
    # Called in a task of an array, sbatch would pass the task's number on to a job outside the array (22.05.8).
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_ARRAY_")}
    try:
        done = subprocess.run(
            list(argv),
            env={**own, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            start_new_session=True,  # Ctrl-C must reach afina alone: it records the job before it exits
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{argv[0]} did not answer for {timeout_s:.0f} s", "slurmctld may be busy; try again"
        ) from None
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise SlurmError(f"{argv[0]} refused: {reason}", _remedy(argv[0], reason))
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
    return next(remedy for words, remedy in _REMEDIES if words in reason.lower())
