"""`test_looks.jsonl` of a run: how often its test split was looked at by a command that compares runs.

A choice that follows such a look makes the scores on test too kind. Not covered: looks at `outcome.json`, a report or the predictions
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afina.errors import AfinaError
from afina.run.directory import RunDir
from afina.text import plural

__all__ = ["look_at_test", "times_looked"]

_FILE = "test_looks.jsonl"


def look_at_test(runs: Sequence[Path], command: str, metric: str) -> str:
    """Record a look at the test split of each run; returns how often the most examined of them was looked at before, in words."""
    before, unrecorded = max(map(times_looked, runs), default=0), 0
    for run in runs:
        try:
            RunDir(run).append(_FILE, {"command": command, "metric": metric})
        except (AfinaError, OSError):
            unrecorded += 1
    times = "for the first time" if not before else f"{plural(before, 'time')} before"
    lost = f" This look could not be recorded in {unrecorded} of them." if unrecorded else ""
    return f"Test: looked at {times} by compare or sweep; each look that leads to a choice makes it too kind.{lost}"


def times_looked(run: Path) -> int:
    """How often the test split of a run was looked at."""
    return sum(1 for _ in RunDir(run).lines(_FILE))
