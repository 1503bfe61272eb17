"""The prepare stage in this process and as a process of its own, and what the tests check of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from tests.unit.forks import ForkedWorkers

from afina.errors import AfinaError
from afina.run.plan import Plan

#: Of the prepare stage: shards so small that little data has many.
SMALL_SHARDS = {
    "afina.worker.data.tokens.shards.SHARD_BYTES": 40_000,
    "afina.worker.data.tokens.tokenise._BATCH_BYTES": 10_000,
}

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


def start(plan: Plan, **env: str) -> subprocess.Popen[str]:
    """The stage with small shards as a process that is running, a fork."""
    process = ForkedWorkers(
        [sys.executable, "-m", "afina.worker", "prepare"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **env},
        text=True,
        constants=SMALL_SHARDS,
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
