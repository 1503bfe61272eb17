"""Read run directories, cheaply and tolerantly: for status and reports over a thousand runs.

A few small files are read whole, of the logs the last 64 KB; nothing is validated, and what is missing, torn or damaged is empty.
Code that acts on a run opens it with `afina.run.directory` instead. Slurm is not asked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from afina.files import read_json
from afina.formats.columns import flatten
from afina.recipe.metrics import METRICS, lower_is_better, metric_name, selection_metric
from afina.run.directory import job_ids_of
from afina.run.outcome import data_warnings
from afina.run.supervise import Liveness, lease_of
from afina.schedule import Schedule

__all__ = ["Reading", "RunResult", "decisive_lines", "differing", "job_log", "read_result", "read_run"]

#: Bytes read from the end of a log: some four hours of its once-a-minute lines.
_TAIL = 65536


@dataclass(frozen=True)
class RunResult:
    """A run's recipe and outcome: `plan.json` and `outcome.json`.

    Attributes:
        recipe: as in the plan; empty where that cannot be read.
        outcome: the outcome's fields; empty while there is none.
        made, recorded: when plan and outcome were written, in seconds since the epoch; 0 for a missing file.
    """

    path: Path
    recipe: Mapping[str, Any]
    outcome: Mapping[str, Any]
    made: float = 0.0
    recorded: float = 0.0

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.path.name)

    @property
    def finished(self) -> bool:
        return self.outcome.get("outcome") == "finished"

    @property
    def train(self) -> Mapping[str, Any]:
        section = self.recipe.get("train")
        return section if isinstance(section, dict) else {}

    @property
    def metric_texts(self) -> tuple[str, ...]:
        """The metrics as the recipe writes them."""
        given, best = self.recipe.get("metrics"), self.train.get("best_metric")
        texts = [text for text in [*(given if isinstance(given, list) else ()), best] if isinstance(text, str)]
        return tuple(text for text in texts if text.count(":") < 3)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Reservations about the metrics: those of the outcome, which has those about the data; where it has none, those of `prepared.json`."""
        if "warnings" in self.outcome:
            return tuple(map(str, self.outcome["warnings"] or ()))
        spoiled = data_warnings(read_json(self.path / "prepared.json"))
        return tuple(dict.fromkeys(line for lines in spoiled.values() for line in lines))

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The scores that are one number, without `eval_` in front."""
        scores = self.outcome.get("metrics")
        return {
            name.removeprefix("eval_"): float(value)
            for name, value in (scores if isinstance(scores, dict) else {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    @property
    def metric(self) -> str | None:
        """The metric that selects the best checkpoint, where the run has a score of it."""
        task = str(self.outcome.get("task") or self.recipe.get("task"))
        given = self.train.get("best_metric")
        chosen = selection_metric(task, given) if given or task in METRICS else None
        return chosen if chosen in self.metrics else None

    @property
    def fold(self) -> int | None:
        """The number of its fold, counted over all repeats; None of other runs."""
        fold = (self.recipe.get("data") or {}).get("fold")
        return (fold["repeat"] - 1) * fold["of"] + fold["number"] if isinstance(fold, dict) else None

    def flat_recipe(self) -> dict[str, Any]:
        """The keys that are set: `train.learning_rate` -> value."""
        return {key: value for key, value in flatten(self.recipe).items() if value not in (None, {}, [])}


@dataclass(frozen=True)
class Reading:
    """Progress of a run, from its files.

    Attributes:
        job_ids: its Slurm jobs, the newest last.
        submitted: when the newest of them was submitted, in seconds since the epoch; 0 if that is not known.
        cancelled: the jobs that `afina cancel` cancelled.
        attempts: names of the folders in `attempts/`; attempt: the newest that began.
        next: what the newest ended attempt decided: requeue, end, or empty.
        lease: `lease.json`; empty where no attempt holds one.
        liveness: of the lease's holder. alive: its process runs on this machine; dead: it did; fresh: renewed within the last
            minute on another machine; silent: not renewed, on another machine.
        silent_s: seconds since the lease was renewed.
        step, max_steps, epoch, loss: how far the training is.
        best: name, value and step of the best evaluation.
        pace: the last `pace` event of the newest attempt; empty if there is none.
        first_step, checkpoint: time and step of the newest attempt's first step and of its last checkpoint.
    """

    result: RunResult
    job_ids: tuple[str, ...] = ()
    submitted: float = 0.0
    cancelled: tuple[str, ...] = ()
    attempts: tuple[str, ...] = ()
    attempt: str | None = None
    next: str = ""
    lease: Mapping[str, Any] = field(default_factory=dict)
    liveness: Liveness | None = None
    silent_s: float = 0.0
    step: int = 0
    max_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    best: tuple[str, float, int] | None = None
    pace: Mapping[str, Any] = field(default_factory=dict)
    first_step: tuple[float, int] | None = None
    checkpoint: tuple[float, int] | None = None

    @property
    def path(self) -> Path:
        return self.result.path


def differing(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of flat recipes that are not the same in all, in the order of the recipe; the name aside."""
    missing = object()
    return [
        key
        for key in dict.fromkeys(key for recipe in recipes for key in recipe)
        if key != "name" and any(recipe.get(key, missing) != recipes[0].get(key, missing) for recipe in recipes[1:])
    ]


def read_result(path: Path) -> RunResult:
    """Read plan and outcome of a run."""
    plan, made = _json(path / "plan.json")
    outcome, recorded = _json(path / "outcome.json")
    recipe = plan.get("recipe")
    return RunResult(path, recipe if isinstance(recipe, dict) else {}, outcome, made, recorded)


def read_run(path: Path) -> Reading:
    """Read all of a run that `afina status` shows."""
    result = read_result(path)
    attempts = _folders(path / "attempts")
    events = _Events(path / "events.jsonl")
    submissions = [_record(line) for line in _tail_lines(path / "submissions.jsonl")[0]]
    lease, liveness, silent_s = ({}, None, 0.0) if result.finished else lease_of(path)
    log, whole = _tail_lines(path / "metrics.jsonl")
    last = _last(log, b'"step"')
    newest = max(last, events.pace, key=lambda record: record.get("step") or 0)
    steps = [last.get("step"), result.outcome.get("global_step"), events.step]
    return Reading(
        result=result,
        job_ids=job_ids_of(submissions, attempts),
        submitted=max((float(s.get("time") or 0) for s in submissions), default=0.0),
        cancelled=events.cancelled,
        attempts=attempts,
        attempt=events.attempt,
        next=events.next,
        lease=lease,
        liveness=liveness,
        silent_s=silent_s,
        step=max(int(step) for step in (*steps, 0) if step is not None),
        max_steps=result.outcome.get("max_steps") or events.max_steps or _planned_steps(result),
        epoch=newest.get("epoch", last.get("epoch")),
        loss=_last(log, b'"loss"').get("loss", events.pace.get("loss")),
        best=_best(result, log, whole),
        pace=events.pace,
        first_step=events.first_step,
        checkpoint=events.checkpoint,
    )


def job_log(path: Path, job_id: str = "*") -> Path | None:
    """Slurm's log of a job of the run, by default of its newest; a task of an array has it in the array's folder."""
    number = job_id.partition(";")[0]
    logs = [*path.glob(f"slurm-{number}.out"), *path.glob(f"submitit/{number}_*log.out")]
    lines = (_record(line) for line in _tail_lines(path / "submissions.jsonl")[0])
    logs += [Path(line["log"]) for line in lines if line.get("log") and job_id in ("*", line.get("job_id"))]
    if "_" in number:
        logs += path.parent.parent.glob(f"logs/{number}.out")
    logs = [log for log in logs if log.is_file()]
    return max(logs, key=lambda log: log.stat().st_mtime_ns, default=None)


def decisive_lines(path: Path, job_id: str) -> tuple[str, str]:
    """The line of a job's log that tells why it ended, and its remedy: the last error, else the last line."""
    log = job_log(path, job_id)
    if log is None:
        return "it left no log", f"do all nodes see {path}? `afina doctor --job` looks"
    lines = [line.decode(errors="replace") for line in _tail_lines(log)[0]]
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith(("error: ", "slurmstepd: error: ", "srun: error: ")):
            following = lines[number + 1].strip() if number + 1 < len(lines) else ""
            remedy = following.removeprefix("remedy: ") if following.startswith("remedy: ") else ""
            return lines[number].removeprefix("error: ").strip(), remedy
    return next((line.strip() for line in reversed(lines) if line.strip()), ""), ""


# -- files -------------------------------------------------------------------------------------------------------------


def _tail_lines(path: Path) -> tuple[list[bytes], bool]:
    """The lines in the last 64 KB of a JSON Lines file, and whether that is all of it. Not parsed: most are never needed."""
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
    """A JSON object and when it was written; empty where the file is missing or damaged."""
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


# -- progress ----------------------------------------------------------------------------------------------------------


class _Events:
    """The end of `events.jsonl`, read backwards as far as the newest attempt reaches."""

    def __init__(self, path: Path) -> None:
        self.attempt: str | None = None
        self.pace: dict[str, Any] = {}
        self.first_step: tuple[float, int] | None = None
        self.checkpoint: tuple[float, int] | None = None
        self.step: int | None = None
        self.max_steps: int | None = None
        self.next = ""
        self.cancelled: tuple[str, ...] = ()
        for event in self._backwards(path):
            attempt = event.get("attempt")
            if event.get("event") == "cancelled":
                self.cancelled += tuple(map(str, event.get("job_ids") or ()))
            if not attempt:
                continue
            self.attempt = self.attempt or str(attempt)
            if attempt != self.attempt:
                break
            self._take(event)

    def _backwards(self, path: Path) -> Iterator[dict[str, Any]]:
        for line in reversed(_tail_lines(path)[0]):
            if self.pace and b'"event": "pace"' in line:
                continue  # the last one is enough
            yield _record(line)

    def _take(self, event: dict[str, Any]) -> None:
        kind, when, step = event.get("event"), float(event.get("time") or 0), event.get("step")
        if isinstance(step, int):
            self.step = max(self.step or 0, step)
        self.max_steps = self.max_steps or event.get("max_steps")
        if kind == "pace":
            self.pace = event
        elif kind == "attempt_ended":
            self.next = self.next or str(event.get("next") or "")
        elif kind == "first_step" and isinstance(step, int):
            self.first_step = (when, step)
        elif kind == "checkpoint" and isinstance(step, int) and self.checkpoint is None:
            self.checkpoint = (when, step)


def _planned_steps(result: RunResult) -> int | None:
    """Steps of the whole run, before it has begun."""
    train = result.train
    rows = (read_json(result.path / "prepared.json").get("rows") or {}).get("train")
    batch = train.get("batch_size")
    if train.get("max_steps") or not rows or not batch:
        return train.get("max_steps")
    return Schedule.of(int(rows), int(batch), epochs=train.get("epochs")).total_steps


def _best(result: RunResult, log: list[bytes], whole: bool) -> tuple[str, float, int] | None:
    """Name, value and step of the best evaluation by the selection metric; the first of equals, as the training decides."""
    final = result.outcome.get("metrics") or {}
    given = result.train.get("best_metric") or _selection_metric(result, final or _last(log, b'"eval_'))
    name = metric_name(given)
    key = f"eval_{name}"
    if result.train.get("keep", "best") == "best" and isinstance(value := final.get(key), int | float):
        return name, float(value), int(result.outcome.get("model_step") or 0)
    evaluations = [] if whole else _best_in_checkpoint(result.path)
    for record in (_record(line) for line in log if b'"eval_' in line):
        if isinstance(value := record.get(key), int | float):
            evaluations.append((float(value), int(record.get("step") or 0)))
    if not evaluations:
        return None
    value, step = (min if lower_is_better(name, result.metric_texts) else max)(evaluations, key=lambda pair: pair[0])
    return name, value, step


def _selection_metric(result: RunResult, evaluation: Mapping[str, Any]) -> str:
    """By the task; where that is `auto`, by the metrics of an evaluation: F1 may be of either kind of labels."""
    task = str(result.recipe.get("task"))
    if task in METRICS:
        return selection_metric(task)
    names = map(selection_metric, METRICS)
    return next((name for name in names if f"eval_{name}" in evaluation and name != "f1"), "f1")


def _best_in_checkpoint(path: Path) -> list[tuple[float, int]]:
    """The best evaluation that the newest checkpoint remembers, for a log that is longer than its tail."""
    steps = [int(name[5:]) for name in _folders(path / "checkpoints") if re.fullmatch(r"step-[0-9]+", name)]
    state = read_json(path / "checkpoints" / f"step-{max(steps)}" / "trainer_state.json") if steps else {}
    value = state.get("best_metric")
    return [(float(value), int(state.get("best_global_step") or 0))] if isinstance(value, int | float) else []
