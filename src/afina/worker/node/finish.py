"""Record how an attempt ended, and what follows: `python -m afina.worker finish RUN_DIR ATTEMPT CODE`.

The batch script calls it in the container after every attempt that did not finish, with the exit code of the first node.
"""

from __future__ import annotations

import sys

from afina.run.directory import RunDir
from afina.run.requeue import finish_attempt

__all__ = ["main"]


def main(argv: list[str]) -> int:
    outcome = finish_attempt(RunDir(argv[0]), argv[1], int(argv[2]))
    if outcome.outcome == "failed":
        print(f"error: {outcome.error}", file=sys.stderr)
    return 0
