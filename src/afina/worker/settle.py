"""Write down how an attempt ended that could not do so itself: `python -m afina.worker.settle RUN_DIR ATTEMPT CODE`.

The batch script calls it in the container, where the worker left no exit code behind (killed, out of memory, a node gone).
"""

from __future__ import annotations

import sys

from afina.rundir import RunDir
from afina.supervise import settle

__all__ = ["main"]


def main(argv: list[str]) -> int:
    outcome = settle(RunDir(argv[0]), argv[1], int(argv[2]))
    print(f"error: {outcome.error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
