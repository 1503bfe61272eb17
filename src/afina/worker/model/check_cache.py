"""Cache of passed checks under `<scratch>/pins/`, keyed by everything that could change their result.

Where a record cannot be written (a read-only cache), the check runs again next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afina.errors import EnvironmentProblem
from afina.files import write_atomic

__all__ = ["checked_once"]


def checked_once(pins: Path, about: list[Any], check: Callable[[], list[str]]) -> list[str]:
    """Run `check` unless it passed before with the same versions; returns its warnings.

    Args:
        pins: folder of the records.
        about: everything except the installed versions that `check` depends on, as JSON values.
    """
    versions = [importlib.metadata.version(name) for name in ("transformers", "torch")]
    key = json.dumps([*versions, *about], sort_keys=True)
    record = pins / f"checked-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        return [str(w) for w in json.loads(record.read_text(encoding="utf-8"))["warnings"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    result = check()
    with contextlib.suppress(OSError, EnvironmentProblem):
        pins.mkdir(exist_ok=True)
        write_atomic(record, json.dumps({"warnings": result, "about": [*versions, *about]}, indent=1) + "\n")
    return result
