"""Cache of passed checks, and of what else takes seconds, under `<scratch>/pins/`, keyed by everything that could change their result.

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

__all__ = ["checked_once", "kept_once"]


def checked_once(pins: Path, about: list[Any], check: Callable[[], list[str]]) -> list[str]:
    """Run `check` unless it passed before with the same versions; returns its warnings. See `kept_once`."""
    return [str(warning) for warning in kept_once(pins, about, check)]


def kept_once(pins: Path, about: list[Any], make: Callable[[], Any]) -> Any:
    """The JSON value that `make` returned when it was called before with the same versions, else that of a call now.

    Args:
        pins: folder of the records.
        about: everything except the installed versions that it depends on, as JSON values.
    """
    versions = [importlib.metadata.version(name) for name in ("transformers", "torch")]
    key = json.dumps([*versions, *about], sort_keys=True)
    record = pins / f"checked-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        return json.loads(record.read_text(encoding="utf-8"))["warnings"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    result = make()
    with contextlib.suppress(OSError, EnvironmentProblem):
        pins.mkdir(exist_ok=True)
        write_atomic(record, json.dumps({"warnings": result, "about": [*versions, *about]}, indent=1) + "\n")
    return result
