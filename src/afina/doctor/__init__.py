"""Will a job go its way here? Checks as a plain list of functions; each finding is ok, a warning or a failure, with its remedy.

What can be tried is tried: locks and renames are done in a temporary file on scratch, the container is started. Nothing is left
behind, and no secret is printed. The batch job's part is `afina.doctor.job`, what holds in the image `afina.worker.checks.environment`.

Not covered: quotas of file systems whose tools (`quota`, `lfs`) are not here, and limits that Slurm keeps to itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from afina.doctor.container import check_binds, check_image_file, check_runtime
from afina.doctor.disk import (
    check_caches,
    check_clock,
    check_locks,
    check_quota,
    check_recipe,
    check_scratch,
    check_site,
    check_token,
)
from afina.doctor.queue import check_account, check_after_the_end, check_partitions, check_slurm
from afina.doctor.target import Target
from afina.errors import AfinaError
from afina.run.commands import worker_argv, worker_environment
from afina.run.workers import follow_worker
from afina.site.finding import Finding

__all__ = ["CHECKS", "examine", "inside"]

CHECKS: tuple[Callable[[Target], list[Finding]], ...] = (
    check_site,
    check_recipe,
    check_scratch,
    check_quota,
    check_locks,
    check_caches,
    check_token,
    check_clock,
    check_image_file,
    check_runtime,
    check_binds,
    check_slurm,
    check_partitions,
    check_account,
    check_after_the_end,
)
_WITHOUT_SITE = (check_site, check_token, check_slurm, check_after_the_end)


def examine(target: Target, checks: Sequence[Callable[[Target], list[Finding]]] | None = None) -> Iterator[Finding]:
    """The findings, as they come. Without a site only what needs none is looked at."""
    for check in checks if checks is not None else CHECKS:
        if target.site is None and check not in _WITHOUT_SITE:
            continue
        try:
            yield from check(target)
        except AfinaError as error:
            yield Finding(_named(check), "failed", error.message, error.remedy)
        except OSError as error:
            yield Finding(
                _named(check),
                "failed",
                f"{error.filename or ''}: {error.strerror}".lstrip(": "),
                "see what the path is",
            )


def _named(check: Callable[[Target], list[Finding]]) -> str:
    return check.__name__.removeprefix("check_").replace("_", " ")


def inside(target: Target) -> Iterator[Finding]:
    """What `afina.worker.checks.environment` finds in the container, or here where we are in it or there is none.

    Raises:
        EnvironmentProblem: it cannot be started, or says nothing.
    """
    env = dict(target.env)
    if target.where is None:
        argv = [sys.executable, "-m", "afina.worker", "doctor"]
    else:
        argv = worker_argv(target.where, "doctor")
        env |= worker_environment(target.where, offline=True, env=env)
    for line in follow_worker(argv, env, name="the checks in the image"):
        yield Finding(line["check"], line["level"], line["message"], line["remedy"])
