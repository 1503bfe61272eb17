"""What the files of a run say, read cheaply: a few small files whole, the last 64 KB of the logs, nothing validated.

For looking at a thousand runs at once; whoever acts on one run opens it with `afina.run.directory`. What is missing, torn or damaged
reads as nothing. Asks neither Slurm nor the processes of this machine, but for the one that holds the lease.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from afina.processes import boot_id, start_time
from afina.recipe.metrics import METRICS, lower_is_better, selection_metric
from afina.schedule import Schedule

__all__ = ["Reading", "Sign", "job_ids_of", "read_run"]

#: How much of a log is read, in bytes: some four hours of its once-a-minute lines.
_TAIL = 65536
#: A lease is renewed every ten seconds; a shared file system may show it a little later.
_FRESH_S = 60.0
#: Metrics of which the least is best.
#: `<job>.<restart>`, or of an array's task `<array>_<task>.<restart>`.
_OF_A_JOB = re.compile(r"([0-9]+(?:_[0-9]+)?)\.[0-9]+")

Sign = Literal["alive", "fresh", "dead", "silent"]


@dataclass(frozen=True)
class Reading:
    """What the files of one run say.

    Attributes:
        path: the run directory.
        name: the recipe's name; the folder's where the plan cannot be read.
        made: when it was claimed, in seconds since the epoch.
        trackers: where its records go too.
        outcome: `outcome.json`; empty while there is none.
        recorded: when that was written, in seconds since the epoch.
        job_ids: its Slurm jobs, the newest last.
        submitted: when the newest of them was submitted, in seconds since the epoch; 0 if that is not known.
        cancelled: the jobs that `afina cancel` cancelled.
        attempts: names of the folders in `attempts/`.
        attempt: the newest attempt that began.
        next: what the newest attempt that ended left to do: requeue, end, or nothing known.
        lease: `lease.json`; empty where nobody works, or nobody holds it any more.
        sign: alive: its process runs on this machine; dead: it did; fresh: renewed within the last minute, elsewhere;
            silent: not renewed, elsewhere.
        silent_s: seconds since the lease was renewed.
        step, max_steps, epoch, loss: where the training is.
        best: name, value and step of the best evaluation.
        pace: the last `pace` event of the newest attempt; empty if there is none.
        began: when and at which step the newest attempt made its first step.
        saved: when and at which step it made its last checkpoint.
        updated: when the last event was written, in seconds since the epoch.
    """

    path: Path
    name: str
    made: float = 0.0
    trackers: tuple[str, ...] = ()
    outcome: dict[str, Any] = field(default_factory=dict)
    recorded: float = 0.0
    job_ids: tuple[str, ...] = ()
    submitted: float = 0.0
    cancelled: tuple[str, ...] = ()
    attempts: tuple[str, ...] = ()
    attempt: str | None = None
    next: str = ""
    lease: dict[str, Any] = field(default_factory=dict)
    sign: Sign | None = None
    silent_s: float = 0.0
    step: int = 0
    max_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    best: tuple[str, float, int] | None = None
    pace: dict[str, Any] = field(default_factory=dict)
    began: tuple[float, int] | None = None
    saved: tuple[float, int] | None = None
    updated: float = 0.0

    @property
    def finished(self) -> bool:
        return self.outcome.get("outcome") == "finished"


def read_run(path: Path) -> Reading:
    """Read one run directory."""
    plan, made = _json(path / "plan.json")
    recipe = plan.get("recipe") or {}
    train = recipe.get("train") or {}
    outcome, recorded = _json(path / "outcome.json")
    finished = outcome.get("outcome") == "finished"
    attempts = _folders(path / "attempts")
    events = _Events(path / "events.jsonl")
    jobs = _tail(path / "submissions.jsonl")[0]
    lease, sign, silent_s = ({}, None, 0.0) if finished else _lease(path / "lease.json")
    log, whole = _tail_lines(path / "metrics.jsonl")
    last, loss = _last(log, b'"step"'), _last(log, b'"loss"')
    steps = [last.get("step"), outcome.get("global_step"), events.step]
    newest = max(last, events.pace, key=lambda record: record.get("step") or 0)
    return Reading(
        path=path,
        name=str(recipe.get("name") or path.name),
        made=made,
        trackers=tuple(map(str, recipe.get("trackers") or ())),
        outcome=outcome,
        recorded=recorded,
        job_ids=job_ids_of(jobs, attempts),
        submitted=max((float(j.get("time") or 0) for j in jobs), default=0.0),
        cancelled=events.cancelled,
        attempts=attempts,
        attempt=events.attempt,
        next=events.next,
        lease=lease,
        sign=sign,
        silent_s=silent_s,
        step=max(int(step) for step in (*steps, 0) if step is not None),
        max_steps=outcome.get("max_steps") or events.max_steps or train.get("max_steps") or _planned_steps(path, train),
        epoch=newest.get("epoch", last.get("epoch")),
        loss=loss.get("loss", events.pace.get("loss")),
        best=_best(path, log, whole, train, recipe, outcome),
        pace=events.pace,
        began=events.began,
        saved=events.saved,
        updated=events.updated,
    )


def _tail(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The records in the last 64 KB of a JSON Lines file, and whether that is all of it."""
    lines, whole = _tail_lines(path)
    return [record for line in lines if (record := _record(line))], whole


def _tail_lines(path: Path) -> tuple[list[bytes], bool]:
    """As `_tail`, not parsed: most lines are never looked at."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return [], True
    try:
        size = os.fstat(descriptor).st_size
        raw = os.pread(descriptor, _TAIL, max(0, size - _TAIL))
    except OSError:
        return [], True
    finally:
        os.close(descriptor)
    lines = raw.splitlines()
    return (lines, True) if size <= _TAIL else (lines[1:], False)


def _record(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _last(lines: list[bytes], key: bytes) -> dict[str, Any]:
    return next((record for line in reversed(lines) if key in line and (record := _record(line))), {})


def _json(path: Path) -> tuple[dict[str, Any], float]:
    """A small JSON file and when it was written; nothing where it is not there or damaged."""
    try:
        with path.open("rb") as file:
            return _record(file.read()), os.fstat(file.fileno()).st_mtime
    except OSError:
        return {}, 0.0


def _folders(path: Path) -> tuple[str, ...]:
    try:
        with os.scandir(path) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir()))
    except OSError:
        return ()


def job_ids_of(submissions: Sequence[Mapping[str, Any]], attempts: Sequence[str]) -> tuple[str, ...]:
    """Slurm's jobs of a run as they were submitted; of a run that was claimed inside its job, by the names of its attempts."""
    known = [str(s["job_id"]) for s in submissions if s.get("job_id")]
    if not known:
        found = (m[1] for name in attempts if (m := _OF_A_JOB.fullmatch(name)))
        known = sorted(found, key=lambda job: [int(number) for number in job.split("_")])
    return tuple(dict.fromkeys(known))


class _Events:
    """The end of `events.jsonl`, read backwards as far as the newest attempt reaches."""

    def __init__(self, path: Path) -> None:
        self.attempt: str | None = None
        self.pace: dict[str, Any] = {}
        self.began: tuple[float, int] | None = None
        self.saved: tuple[float, int] | None = None
        self.step: int | None = None
        self.max_steps: int | None = None
        self.next = ""
        self.updated = 0.0
        self.cancelled: tuple[str, ...] = ()
        for event in self._backwards(path):
            kind, attempt = event.get("event"), event.get("attempt")
            self.updated = max(self.updated, float(event.get("time") or 0))
            if kind == "cancelled":
                self.cancelled += tuple(map(str, event.get("job_ids") or ()))
            if not attempt:
                continue
            self.attempt = self.attempt or str(attempt)
            if attempt != self.attempt:
                break
            self._take(str(kind), event)

    def _backwards(self, path: Path) -> Iterator[dict[str, Any]]:
        for line in reversed(_tail_lines(path)[0]):
            if self.pace and b'"event": "pace"' in line:
                continue  # the last one says it all
            yield _record(line)

    def _take(self, kind: str, event: dict[str, Any]) -> None:
        when, step = float(event.get("time") or 0), event.get("step")
        if isinstance(step, int):
            self.step = max(self.step or 0, step)
        self.max_steps = self.max_steps or event.get("max_steps")
        if kind == "pace":
            self.pace = event
        elif kind == "attempt_ended":
            self.next = self.next or str(event.get("next") or "")
        elif kind == "first_step" and isinstance(step, int):
            self.began = (when, step)
        elif kind == "checkpoint" and isinstance(step, int) and self.saved is None:
            self.saved = (when, step)


def _lease(path: Path) -> tuple[dict[str, Any], Sign | None, float]:
    lease, renewed = _json(path)
    if not lease:
        return {}, None, 0.0
    silent_s = max(0.0, time.time() - renewed)
    if lease.get("boot") == boot_id():
        # Not by the process alone: its number may be another one's by now.
        return lease, "alive" if lease.get("started") == start_time(int(lease.get("pid") or 0)) else "dead", silent_s
    if lease.get("host") == platform.node():
        return lease, "dead", silent_s  # the machine has been started anew since
    return lease, "fresh" if silent_s < _FRESH_S else "silent", silent_s


def _planned_steps(path: Path, train: dict[str, Any]) -> int | None:
    """Steps of the whole run, before it has begun: epochs of so many rows."""
    rows = (_json(path / "prepared.json")[0].get("rows") or {}).get("train")
    batch = train.get("batch_size")
    if not rows or not batch:
        return None
    return Schedule.of(int(rows), int(batch), epochs=train.get("epochs")).total_steps


def _best(
    path: Path,
    log: list[bytes],
    whole: bool,
    train: dict[str, Any],
    recipe: dict[str, Any],
    outcome: dict[str, Any],
) -> tuple[str, float, int] | None:
    """The best evaluation by the metric that chooses the best checkpoint; the first of equals, as the training decides."""
    metrics = outcome.get("metrics") or {}
    last = metrics or _last(log, b'"eval_')
    name = train.get("best_metric") or _first_metric(recipe.get("task"), last)
    key = f"eval_{name}"
    if train.get("keep", "best") == "best" and isinstance(value := metrics.get(key), int | float):
        return name, float(value), int(outcome.get("model_step") or 0)
    found = [] if whole else _best_before(path)
    for record in (_record(line) for line in log if b'"eval_' in line):
        if isinstance(value := record.get(key), int | float):
            found.append((float(value), int(record.get("step") or 0)))
    if not found:
        return None
    value, step = (min if lower_is_better(name) else max)(found, key=lambda pair: pair[0])
    return name, value, step


def _first_metric(task: Any, record: dict[str, Any]) -> str:
    known = {task: selection_metric(task) for task in METRICS}
    return known.get(task) or next((m for m in known.values() if f"eval_{m}" in record and m != "f1"), "f1")


def _best_before(path: Path) -> list[tuple[float, int]]:
    """What the newest checkpoint remembers of evaluations that lie before the end of the log."""
    steps = [name for name in _folders(path / "checkpoints") if re.fullmatch(r"step-[0-9]+", name)]
    if not steps:
        return []
    newest = max(steps, key=lambda name: int(name[5:]))
    state = _json(path / "checkpoints" / newest / "trainer_state.json")[0]
    if isinstance(value := state.get("best_metric"), int | float):
        return [(float(value), int(state.get("best_global_step") or 0))]
    return []
