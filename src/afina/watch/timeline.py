"""Attempts of a run over time, from the records of `events.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AttemptTimes", "timeline"]


@dataclass(frozen=True)
class AttemptTimes:
    """Times of one attempt by its node's clock, in seconds since the epoch; None for what it did not reach.

    Attributes:
        step: the step that it began at; newest_step: the last one that an event names.
        saves, save_s, stall_s: checkpoints, seconds of writing them, seconds that training waited for them.
        outcome: finished, stopped or failed; None where it is not recorded.
    """

    name: str
    started: float | None = None
    training: float | None = None
    first_step: float | None = None
    last: float | None = None
    step: int | None = None
    newest_step: int | None = None
    saves: int = 0
    save_s: float = 0.0
    stall_s: float = 0.0
    outcome: str | None = None


def timeline(events: Iterable[Mapping[str, Any]]) -> list[AttemptTimes]:
    """The attempts in the order in which they started."""
    attempts: dict[str, dict[str, Any]] = {}
    for event in events:
        name, when, kind = event.get("attempt"), event.get("time"), event.get("event")
        if not isinstance(name, str) or not isinstance(when, int | float):
            continue
        attempt = attempts.setdefault(name, {"name": name, "saves": 0, "save_s": 0.0, "stall_s": 0.0})
        attempt["last"] = max(when, attempt.get("last", when))
        if isinstance(step := event.get("step"), int):
            attempt["newest_step"] = max(step, attempt.get("newest_step", step))
        if kind == "attempt_started":
            attempt.setdefault("started", when)
        elif kind == "training":
            attempt.setdefault("training", when)
            attempt.setdefault("step", event.get("step"))
        elif kind == "first_step":
            attempt.setdefault("first_step", when)
        elif kind == "checkpoint":
            attempt["saves"] += 1
            attempt["save_s"] += float(event.get("seconds") or 0)
            attempt["stall_s"] += float(event.get("stall_s") or 0)
        elif kind == "attempt_ended":
            attempt["outcome"] = event.get("outcome")
        elif kind == "finished":
            attempt["outcome"] = "finished"
    return [AttemptTimes(**attempt) for attempt in attempts.values()]
