"""The one door into the container: `python -m afina.worker COMMAND … [--json]`. Nothing else of the worker is started as a process.

With `--json` a failure is the last line of standard output (see `afina.worker.reply`), else a message on standard error.
"""

from __future__ import annotations

import io
import sys
from importlib import import_module

from afina.redact import RedactedStream
from afina.worker.reply import reply

__all__ = ["ANSWERS", "PROCESSES", "main"]

#: Commands that answer their caller, and the module whose `answer(arguments)` makes the answer; imported when it is needed.
ANSWERS = {
    "prepare": "afina.worker.checks.model_check",
    "peek": "afina.worker.hub.datasets",
    "trial": "afina.worker.node.trial",
    "rehearse": "afina.worker.node.rehearse",
    "predict": "afina.worker.predicting.stages",
    "baselines": "afina.worker.inference.simple_models",
    "export": "afina.worker.inference.model_folder",
    "doctor": "afina.worker.checks.environment",
}
#: Commands that run processes, and the module whose `main(arguments)` returns the exit code.
PROCESSES = {
    "launch": "afina.worker.node.launcher",
    "train": "afina.worker.training.train",
    "finish": "afina.worker.node.finish",
    "check-node": "afina.worker.checks.environment",
    "selftest": "afina.worker.checks.selftest",
}


def main(argv: list[str]) -> int:
    """Run a command; returns its exit code, see `afina.errors`."""
    command, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if command not in ANSWERS and command not in PROCESSES:
        print(f"usage: python -m afina.worker {'|'.join([*ANSWERS, *PROCESSES])} …", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale: messages have signs that ASCII lacks
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if command not in ("launch", "train"):  # these two write the log of a node, each in its own way
        # Also what libraries log, and the traceback of a defect.
        sys.stderr = RedactedStream.over(sys.stderr)
    if command in PROCESSES:
        code: int = import_module(PROCESSES[command]).main(arguments)
        return code
    words = [word for word in arguments if word != "--json"]
    return reply(lambda: import_module(ANSWERS[command]).answer(words), as_json=words != arguments)


if __name__ == "__main__":
    # `-m` puts the working directory first, where a file named like a library may lie. From Python 3.11 on `-P` leaves it out.
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)
    sys.exit(main(sys.argv[1:]))
