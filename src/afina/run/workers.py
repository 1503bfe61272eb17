"""A question to a worker: a process with text on its standard input, whose last line of output is one JSON object.

Its messages for people go to standard error, as they come. An object with `error` is one of `afina.errors`, said by the worker
and raised here. An interrupt ends the worker and what it started before it goes on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from afina import errors
from afina.errors import AfinaError, EnvironmentProblem

__all__ = ["ask_worker"]


def ask_worker(argv: Sequence[str], question: str, env: Mapping[str, str], what: str) -> dict[str, Any]:
    """Run `argv` in the environment `env` and return what it answers.

    Args:
        what: what it is called in messages: "the prepare stage".

    Raises:
        AfinaError: as the worker said it.
        EnvironmentProblem: it cannot be started, or ends without an answer.
    """
    try:
        worker = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(env), start_new_session=True
        )
    except OSError as error:
        raise EnvironmentProblem(
            f"{argv[0]}: {error.strerror}",
            "install Apptainer, or load its module in site.env (AFINA_RUNTIME=none runs without)",
        ) from None
    try:
        out, _ = worker.communicate(question.encode())
    except BaseException:
        os.killpg(worker.pid, signal.SIGTERM)
        try:
            worker.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
        raise
    lines = out.decode(errors="replace").strip().splitlines()
    try:
        said = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise EnvironmentProblem(
            f"{what} ended with {worker.returncode} and said nothing", "see the lines above"
        ) from None
    if not isinstance(said, dict) or "error" in said:
        kind = getattr(errors, str(said["error"]), AfinaError)
        raise kind(said["message"], said["remedy"])
    return said
