"""The one door into the container: `python -m afina.worker COMMAND …`. Nothing else of the worker is started as a process."""

from __future__ import annotations

import sys
from importlib import import_module

from afina.redact import RedactedStream

__all__ = ["COMMANDS", "main"]

#: Each command and the module whose `main(argv)` it is; imported only when it is asked for.
COMMANDS = {
    "prepare": "afina.worker.data.prepare",
    "peek": "afina.worker.data.peek",
    "launch": "afina.worker.node.launch",
    "train": "afina.worker.training.train",
    "finish": "afina.worker.node.finish",
    "trial": "afina.worker.node.trial",
    "rehearse": "afina.worker.training.rehearse",
    "predict": "afina.worker.inference.stages",
    "export": "afina.worker.inference.model_folder",
    "doctor": "afina.worker.checks.environment",
    "selftest": "afina.worker.checks.selftest",
}


def main(argv: list[str]) -> int:
    """Run a command; returns its exit code, see `afina.errors`."""
    if not argv or argv[0] not in COMMANDS:
        print(f"usage: python -m afina.worker {'|'.join(COMMANDS)} …", file=sys.stderr)
        return 2
    if argv[0] not in ("launch", "train"):  # these two write the log of a node, each in its own way
        # Also what libraries log, and the traceback of a defect.
        sys.stderr = RedactedStream.over(sys.stderr)
    code: int = import_module(COMMANDS[argv[0]]).main(argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
