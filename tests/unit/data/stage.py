"""The prepare stage in this process and as a process of its own, and what the tests check of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from afina.errors import AfinaError
from afina.run.plan import Plan

#: The prepare stage with shards so small that little data has many.
SMALL_SHARDS = """
import sys
from afina.worker.__main__ import main
from afina.worker.data.tokens import shards, tokenise
shards.SHARD_BYTES, tokenise._BATCH_BYTES = 40_000, 10_000
sys.exit(main(["prepare"]))
"""

Ran = subprocess.CompletedProcess[str]


def prepare_here(plan: Plan, messages: list[str] | None = None) -> dict[str, Any]:
    """The stage in this process, which saves its start and its imports."""
    from afina.worker.data.prepare import prepare

    return prepare(plan, (messages if messages is not None else []).append)


def refused_here(plan: Plan) -> str:
    """Message and remedy of the refusal."""
    with pytest.raises(AfinaError) as refused:
        prepare_here(plan)
    assert refused.value.exit_code == 2 and refused.value.remedy
    return f"{refused.value.message}\n{refused.value.remedy}"


def prepare(plan: Plan | str, *arguments: str, env: dict[str, str] | None = None, **options: Any) -> Ran:
    return subprocess.run(
        [sys.executable, "-m", "afina.worker", "prepare", *arguments],
        input=plan if isinstance(plan, str) else plan.to_json(),
        env={**os.environ, **(env or {})},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        **options,
    )


def start(plan: Plan, program: str = SMALL_SHARDS, **env: str) -> subprocess.Popen[str]:
    """The stage as a process that is running."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **env},
        text=True,
        # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None
    process.stdin.write(plan.to_json())
    process.stdin.close()
    process.stdin = None
    return process


def finished(process: subprocess.Popen[str]) -> Ran:
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def result(ran: Ran) -> dict[str, Any]:
    assert ran.returncode == 0, ran.stderr
    value = json.loads(ran.stdout.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def refused(ran: Ran, code: int) -> str:
    """The message, after the checks that every refusal passes."""
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stderr.count("error: ") == 1 and "\n  remedy: " in ran.stderr, ran.stderr
    assert ran.stdout == ""
    return ran.stderr


def leftovers(plan: Plan) -> list[str]:
    return [p.name for p in plan.site.prepared.iterdir()] if plan.site.prepared.is_dir() else []
