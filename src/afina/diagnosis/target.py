"""The target of the checks: one site, its cluster and, where one is given, a recipe's plan."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from afina.errors import AfinaError
from afina.processes import run_captured
from afina.run.plan import Plan, bare_plan
from afina.site.settings import Site
from afina.slurm.cluster import Cluster

__all__ = ["ANSWER_S", "Target", "answer_of"]

#: Seconds that a command may take to answer.
ANSWER_S = 60


@dataclasses.dataclass(frozen=True)
class Target:
    """The target of the checks. `site` and `plan` are None where they could not be read; `error` says why."""

    env: Mapping[str, str]
    cluster: Cluster
    site: Site | None = None
    plan: Plan | None = None
    error: AfinaError | None = None
    has_recipe: bool = False
    with_job: bool = False  # a test job follows, which checks what nodes see

    @property
    def where(self) -> Plan | None:
        """A plan for commands in the container: the recipe's, else one of the site alone."""
        return self.plan or (bare_plan(self.site) if self.site is not None else None)

    @property
    def sbatch(self) -> Mapping[str, str]:
        """The environment with the site's own `SBATCH_*` variables."""
        return {**self.env, **(self.site.sbatch if self.site else {})}

    @property
    def has_slurm(self) -> bool:
        return shutil.which("sbatch", path=self.env.get("PATH")) is not None


def answer_of(argv: Sequence[str], env: Mapping[str, str]) -> str | None:
    """The standard output of a command; None where it is missing, fails or takes longer than `ANSWER_S`."""
    try:
        done = run_captured(argv, env, ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
