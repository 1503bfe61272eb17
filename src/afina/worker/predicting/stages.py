"""Prediction with a model folder on files: `python -m afina.worker predict STAGE …`, started by `afina predict`.

    plan < job.json                       check the inputs and make `OUT.parts/`, or report how much of it is done
    run PARTS [--share K/N] [--merge]     predict the missing chunks of a share: those with number ≡ K modulo N
    merge PARTS                           parts to the output

Every stage may be killed at any instant and repeated. `--progress json` reports `{"rows": …}` for the host's bar (see
`afina.worker.reply`); `--progress log` prints a line a minute on standard error.
"""

from __future__ import annotations

import argparse
from typing import Any

from afina.prediction.request import Prediction
from afina.recipe.keys.train_keys import AS_RECORDED
from afina.worker.predicting.plan_parts import plan
from afina.worker.predicting.predict_parts import merge, run
from afina.worker.reply import read_question

__all__ = ["answer"]


def answer(arguments: list[str]) -> dict[str, Any]:
    """The answer of one stage."""
    parser = argparse.ArgumentParser(prog="afina.worker predict", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in ("plan", "run", "merge"):
        stage = stages.add_parser(name)
        if name != "plan":
            stage.add_argument("parts")
        if name == "run":
            stage.add_argument("--share", default="0/1")
            stage.add_argument("--merge", action="store_true")
            stage.add_argument("--progress", choices=("json", "log"), default="log")
    options = parser.parse_args(arguments)
    if options.stage == "plan":
        return plan(Prediction.model_validate(read_question("a prediction"), context=AS_RECORDED))
    if options.stage == "merge":
        return merge(options.parts)
    number, _, of = options.share.partition("/")
    return run(options.parts, int(number), int(of), and_merge=options.merge, progress=options.progress)
