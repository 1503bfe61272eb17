"""Check the image's signature inside a job: `python -m afina.run.image_check RUN`, from submitit's batch script."""

from __future__ import annotations

import sys
from pathlib import Path

from afina.errors import AfinaError
from afina.run.allocation import Allocation
from afina.run.directory import RunDir
from afina.site.image import check_image

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Check the image of a run inside its job; an error is printed and recorded as the attempt's outcome."""
    run = RunDir(Path(argv[0]))
    try:
        check_image(run.plan().site)
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        attempt = Allocation.from_env().attempt_of_job
        run.begin_attempt(attempt)
        run.record_failure(attempt, error.failure)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
