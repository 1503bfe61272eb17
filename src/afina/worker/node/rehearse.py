"""Measure what a run will cost: `python -m afina.worker rehearse RUN_DIR`.

The network is cut first, before a thread is started; `afina.worker.node.rehearsal` does the rest.
"""

from __future__ import annotations

import time
import traceback
from typing import Any

from afina.errors import AfinaError, TrainingError, first_line, is_out_of_memory
from afina.run.directory import RunDir
from afina.run.plan import Geometry
from afina.worker.isolation import cut_network, interfaces
from afina.worker.reply import read_question
from afina.worker.startup import NOT_NEEDED, hide_packages

__all__ = ["answer"]


def answer(arguments: list[str]) -> dict[str, Any]:
    """The measurements. The question: {"geometry": the real one, "steps": at least so many, "seconds": at least so long}."""
    began = time.monotonic()
    is_cut = cut_network()
    question = read_question("a question for a rehearsal")
    run, geometry = RunDir(arguments[0]), Geometry.model_validate(question["geometry"])
    try:
        with hide_packages(*NOT_NEEDED):
            from afina.worker.node.rehearsal import rehearse

        measured = rehearse(run, geometry, question["steps"], question["seconds"], began)
    except AfinaError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            traceback.print_exc()
            raise TrainingError(
                f"the first steps failed: {type(error).__name__}: {first_line(error)}",
                "see the lines above; a run would fail so too",
                cause=type(error).__name__,
            ) from error
        remedy = "set train.max_batch_per_device lower; the global batch and the result stay the same"
        if run.plan().recipe.train.sharding != "none":
            remedy = "a rehearsal holds the whole model in one process, which the run divides: submit without one"
        raise TrainingError(
            f"the longest batch does not fit into memory: {first_line(error)}", remedy, cause="memory"
        ) from error
    return {**measured, "network": "cut" if is_cut and not interfaces() else "offline variables"}
