"""Submit with sbatch."""

from __future__ import annotations

from collections.abc import Sequence

from afina.errors import SlurmError
from afina.run.commands import sbatch_argv
from afina.run.directory import RunDir
from afina.run.plan import Plan
from afina.slurm.client import run_command
from afina.slurm.cluster import read_config

__all__ = ["max_array_size", "site_variables", "submit_sbatch", "submit_script"]


def submit_sbatch(plan: Plan, run: RunDir) -> str:
    """Submit `slurm/finetune.sbatch` for this run; returns the job id.

    Raises:
        SlurmError: no sbatch on PATH, or Slurm refused; with its own message.
    """
    argv = sbatch_argv(plan, run.path)
    job_id = submit_script(plan, argv)
    run.append("submissions.jsonl", {"job_id": job_id, "via": "sbatch", "argv": argv})
    return job_id


def submit_script(plan: Plan, argv: Sequence[str]) -> str:
    """Run `argv`, an `sbatch --parsable …`, with the variables of the plan's site; returns the job id.

    Raises:
        SlurmError: as `submit_sbatch`.
    """
    answer = run_command(argv, env=site_variables(plan)).strip()
    job_id = (answer.splitlines() or [""])[-1].split(";")[0]
    if not job_id.isdigit():
        raise SlurmError(f"sbatch answered {answer!r} instead of a job id", "check with `squeue --me` for the job")
    return job_id


def max_array_size() -> int:
    """One more than the highest index of an array task here; Slurm's default, 1001, where Slurm does not answer."""
    size = read_config().get("MaxArraySize", "")
    return max(1, int(size)) if size.isdigit() else 1001


def site_variables(plan: Plan) -> dict[str, str]:
    """Variables that sbatch gets beside the caller's, so that the job uses the same site."""
    site = plan.site
    variables = {"AFINA_SCRATCH": str(site.scratch), **site.sbatch}
    if site.file:
        variables["AFINA_SITE"] = str(site.file)
    if site.image:
        variables["AFINA_IMAGE"] = str(site.image)
    return variables
