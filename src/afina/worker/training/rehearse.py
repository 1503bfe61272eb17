"""Measure what a run will cost: `python -m afina.worker rehearse RUN_DIR` with a question (JSON) on standard input.

The network is cut first, before a library can start a thread; `afina.worker.training.rehearsal` does the rest. The last line of
standard output is one JSON object: what was measured, or an error as `afina.errors` writes it.
"""

from __future__ import annotations

import json
import sys
import time

from afina.errors import AfinaError, TrainingError
from afina.run.directory import RunDir
from afina.run.plan import Geometry
from afina.worker.isolation import cut_network, interfaces
from afina.worker.startup import without

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Standard input: {"geometry": the real one, "steps": at least so many, "seconds": of steps beyond those}."""
    began = time.monotonic()
    question = json.loads(sys.stdin.read())
    is_cut = cut_network()
    run, geometry = RunDir(argv[0]), Geometry.model_validate(question["geometry"])
    try:
        with without("datasets", "scipy"):
            from afina.worker.training.rehearsal import rehearse

        said = rehearse(run, geometry, question["steps"], question["seconds"], began)
    except AfinaError as error:
        print(error.to_json(), flush=True)
        return error.exit_code
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
            raise
        known = TrainingError(
            f"the longest batch does not fit into memory: {str(error).splitlines()[0] if str(error) else 'MemoryError'}",
            "set train.max_batch_per_device lower; the global batch and the result stay the same",
        )
        print(known.to_json(), flush=True)
        return known.exit_code
    said["network"] = "cut" if is_cut and not interfaces() else "offline variables"
    print(json.dumps(said), flush=True)
    return 0
