"""Checks of everything that a job depends on: a plain list of functions; each finding is ok, a warning or failed, with its remedy.

Checks try things out where they can: locks and renames in a temporary file on scratch, the container by starting it. They leave
nothing behind and print no secret. The checks in a batch job are in `afina.diagnosis.job`, those in the image in `afina.worker.checks.environment`.

Not covered: quotas of file systems whose tools (`quota`, `lfs`) are missing here, and limits that Slurm does not show.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from afina.diagnosis.container import check_binds, check_image_file, check_runtime
from afina.diagnosis.disk import (
    check_caches,
    check_clock,
    check_locks,
    check_quota,
    check_recipe,
    check_scratch,
    check_sharing,
    check_site,
    check_token,
)
from afina.diagnosis.queue import check_account, check_after_the_end, check_partitions, check_slurm
from afina.diagnosis.target import Target
from afina.errors import AfinaError
from afina.run.commands import worker_argv, worker_environment
from afina.run.workers import follow_worker
from afina.site.finding import Finding
from afina.site.settings import without_isolation

__all__ = ["CHECKS", "examine", "inside"]

Check = Callable[[Target], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    check_site,
    check_recipe,
    check_scratch,
    check_sharing,
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


def examine(target: Target, checks: Sequence[Check] = CHECKS) -> Iterator[Finding]:
    """The findings, one by one. Without a site only the checks that need none are made."""
    for check in checks:
        if target.site is None and check not in _WITHOUT_SITE:
            continue
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            yield from check(target)
        except AfinaError as error:
            yield Finding(name, "failed", error.message, error.remedy)
        except OSError as error:
            message = f"{error.filename or ''}: {error.strerror}".lstrip(": ")
            yield Finding(name, "failed", message, "check that path")


def inside(target: Target) -> Iterator[Finding]:
    """The findings of `afina.worker.checks.environment`: in the container, or here if this is the container or there is none.

    Raises:
        EnvironmentProblem: it cannot be started, or ends without an answer.
    """
    env = without_isolation(target.env)
    if target.where is None:
        argv = [sys.executable, "-m", "afina.worker", "doctor"]
    else:
        argv = worker_argv(target.where, "doctor")
        env |= worker_environment(target.where, offline=True, env=env)
    for line in follow_worker(argv, env, name="the checks in the image"):
        yield Finding(**line)
