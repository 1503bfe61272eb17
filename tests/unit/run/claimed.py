"""Run directories as the tests of one claim them."""

from __future__ import annotations

import stat
from pathlib import Path

from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.plan import Plan

ARGV = [
    "python",
    "-m",
    "worker",
    "a b",
    "'; echo foo",
    "$(touch pwned)",
    "{run}/not this",
    "line\nbreak",
    "",
    "☃",
    "{run}",
]


def claimed(plan: Plan, path: Path | None = None) -> RunDir:
    return claim(plan, {"prepared": "/p", "model": "/m"}, ARGV, "name: as written ☃\n", path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
