"""Processes of this machine, read from /proc: their states, environments and descendants; signals; waiting."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

__all__ = ["alive", "descendants", "environ", "pids", "signal_all", "state", "wait_until"]

T = TypeVar("T")


def pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def state(pid: int) -> str:
    """One letter, as in /proc/PID/stat; `X` for a process that does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def alive(pid: int) -> bool:
    return state(pid) not in "ZX"


def environ(pid: int) -> dict[str, str]:
    """The environment it was started with; empty if it cannot be read."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs, nearest first; not those whose parent has ended."""
    children: dict[int, list[int]] = {}
    for child in pids():
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(child)
    found = list(children.get(pid, []))
    for known in found:
        found += children.get(known, [])
    return found


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_until(
    reached: Callable[[], T], timeout_s: float = 30, *, pause_s: float = 0.05, failure: Callable[[], str] | str = ""
) -> T:
    """Poll until `reached` returns something true, and return that.

    Raises:
        AssertionError: not within `timeout_s` seconds; with `failure`.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := reached()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {failure if isinstance(failure, str) else failure()}")
        time.sleep(pause_s)
    return value
