"""Runs one scenario, or one run with random kills, to its end, and compares it with the undisturbed run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.disks import Disk
from tests.faults.inject import Scene, random_kill
from tests.faults.live_run import LiveRun, TooLate, committed_steps
from tests.faults.results import RANDOM, Result, broken_promises
from tests.faults.scenarios import Scenario

__all__ = ["MakeRun", "Reference", "references", "run_random_kills", "run_scenario"]

#: Manual resumes after which a run counts as lost.
MAX_RESUMES = 8
#: Seconds after which an attempt counts as hung. Everything here takes seconds, Slurm's requeue included.
HANG_S = {"local": 150, "slurm": 300}
#: Recipe keys that change how a run is saved, not what is trained.
_SAVING = {"train.stall_minutes", "train.save_every", "train.save_minutes"}
_REQUEUED = "requeued"

#: Makes the run of a name, on a small disk or none, with a command prefix.
MakeRun = Callable[[str, Disk | None, Sequence[str]], LiveRun]


@dataclass(frozen=True)
class Reference:
    """The undisturbed run: digests of its weights and metrics log, and its wall time from its claim on."""

    weights: str
    metrics: str
    seconds: float
    log_lines: tuple[str, ...]


class Monitor:
    """Polls a run in a thread: counts repeated steps, unused checkpoints and restarts from step 0."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.live = scene, scene.live
        self.repeated = self.overlooked = 0
        self.silent = False
        self._last_step = self._committed = self._read = self._starts = 0
        self._begun: set[str | None] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.update()

    def update(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # a failing disk is part of some scenarios
            events = self.live.events()
            for event in events[self._read :]:
                # Read again where the file could not be read for a while, or lost its end.
                if event.get("event") == "first_step" and event.get("attempt") not in self._begun:
                    self._begun.add(event.get("attempt"))
                    self._started(int(event["step"]) - 1)
            self._read = len(events)
            self._last_step = max(self._last_step, self.live.step())
            # A damaged checkpoint is not committed, whatever its name.
            known = [] if self.scene.damaged else [self._committed, *committed_steps(self.live.run)]
            self._committed = max(known, default=0)

    def _started(self, step: int) -> None:
        self._starts += 1
        if self._starts > 1:
            self.repeated += max(0, self._last_step - step)
            self.overlooked += max(0, self._committed - step)
            self.silent |= step == 0 and (self._committed > 0 or self.scene.damaged)
        self._last_step = step

    def _poll(self) -> None:
        while not self._closed.wait(0.1):
            self.update()


def references(make: MakeRun, name: str) -> Callable[[Mapping[str, Any]], Reference]:
    """A function that runs the undisturbed run once per set of changes that changes the training; of any thread."""
    known: dict[str, Future[Reference]] = {}
    lock = threading.Lock()

    def reference(changes: Mapping[str, Any]) -> Reference:
        training = {key: value for key, value in changes.items() if key not in _SAVING}
        with lock:
            number, asked = len(known), known.get(str(training))
            future = known.setdefault(str(training), Future())
        if asked is None:
            try:
                future.set_result(_undisturbed(make(f"{name}-{number}", None, ()), training))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    return reference


def _undisturbed(live: LiveRun, changes: Mapping[str, Any]) -> Reference:
    try:
        live.start(changes)
        began = time.monotonic()
        live.until(live.ended, "its end", patience_s=900, pause_s=0.05)
        seconds = time.monotonic() - began
        if not live.finished:
            raise RuntimeError(f"the undisturbed run did not finish: {live.ended()}, {live.outcome()} in {live.run}")
        lines = (live.run / "metrics.jsonl").read_text().splitlines()
        return Reference(_digest(_weights(live.run)), _digest(live.run / "metrics.jsonl"), seconds, tuple(lines))
    finally:
        live.clean_up()


def run_scenario(
    scenario: Scenario, make: MakeRun, reference: Callable[[], Reference], seed: str, folder: Path
) -> Result:
    """Run one scenario to its end. The same seed makes the same choices; their effect depends on the machine.

    Args:
        reference: the undisturbed run, asked for at the end: other scenarios run beside it.
        seed: of this scenario only.
        folder: mount point of the scenario's small disk.
    """
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(Disk(folder, scenario.disk)) if scenario.disk else None
        live = make(scenario.name, disk, scenario.network)
        stack.callback(live.clean_up)
        result = _run(scenario, Scene(live, random.Random(seed), disk), reference, seed)
        if disk and result.broken:  # keep the run beyond its disk
            kept = shutil.copytree(live.run, folder.with_name(f"{live.run.name}.broken"), dirs_exist_ok=True)
            result = dataclasses.replace(result, run=str(kept))
        return result


def run_random_kills(
    make: MakeRun, reference: Callable[[], Reference], seed: str, kills: int, changes: Mapping[str, Any] = {}
) -> Result:
    """One run, with these changes of its recipe, that is killed `kills` times at random."""
    live = make(f"kills-{seed.replace('/', '-')}", None, ())
    scene = Scene(live, random.Random(seed))
    faults = tuple(partial(random_kill, share=0.5 / kills, last=n == kills) for n in range(1, kills + 1))
    try:
        scenario = Scenario(RANDOM, "Killed at random moments, repeatedly.", faults, changes=changes)
        return _run(scenario, scene, reference, seed)
    finally:
        live.clean_up()


@dataclass
class _Log:
    """What has happened to a run so far."""

    faults: list[str] = dataclasses.field(default_factory=list)
    endings: list[str] = dataclasses.field(default_factory=list)
    by_hand: int = 0
    kills: int = 0
    injected: bool = True
    hung: bool = False
    refused: bool = False


def _run(scenario: Scenario, scene: Scene, reference: Callable[[], Reference], seed: str) -> Result:
    live, log = scene.live, _Log()
    live.start(scenario.changes, scenario.limit_min)
    began = time.monotonic()
    monitor = Monitor(scene)
    try:
        for attempt in range(max(len(scenario.faults), len(scenario.repairs)) + MAX_RESUMES):
            ending = _attempt(scenario, scene, log, attempt)
            if ending == _REQUEUED:
                continue
            monitor.update()
            if attempt < len(scenario.repairs):
                log.faults.append(scenario.repairs[attempt](scene))
            if live.finished and attempt >= len(scenario.repairs):
                break
            log.refused |= any(code in ending for code in ("exit code 2", "exit code 3", "(2:0", "(3:0"))
            if not live.finished:
                log.by_hand += 1
                # Refused, perhaps because the training outlives its host process: try a little later.
                time.sleep(2 if log.refused else 0)
                live.resume()
    finally:
        monitor.close()
    result = _result(scenario, live, log, monitor, time.monotonic() - began, reference(), seed)
    return dataclasses.replace(result, broken=tuple(broken_promises(scenario, result)))


def _attempt(scenario: Scenario, scene: Scene, log: _Log, attempt: int) -> str:
    """Inject the attempt's fault, if there is one, and wait for its end; returns how it ended."""
    live, faults = scene.live, scenario.faults
    if attempt < len(faults):
        try:
            log.faults.append(faults[attempt](scene))
            log.kills += 1
        except TooLate as late:
            log.faults.append(f"too late: {late}")
            log.injected = False
    # A requeued job has not ended; the next fault is for its next start.
    attempts = live.attempts() if attempt + 1 < len(faults) else None
    live.mark()
    try:
        patience = HANG_S[live.setting.where] * (3 if scenario.slow else 1)
        log.endings.append(live.until(partial(_ending, live, attempts), "its end", patience_s=patience, pause_s=0.05))
    except TooLate:
        log.endings.append("hung")
        log.hung = True
        live.clean_up()
    return log.endings[-1]


def _ending(live: LiveRun, attempts: int | None) -> str:
    """How the attempt ended; that it was requeued if there are more attempts than `attempts`; empty while it lives."""
    if ending := live.ended():
        return ending
    return _REQUEUED if attempts is not None and live.attempts() > attempts else ""


def _result(
    scenario: Scenario, live: LiveRun, log: _Log, monitor: Monitor, seconds: float, reference: Reference, seed: str
) -> Result:
    lost = not live.finished
    return Result(
        scenario=scenario.name,
        setting=str(live.setting),
        seed=seed,
        faults=tuple(log.faults),
        endings=tuple(log.endings),
        attempts=live.attempts(),
        by_hand=log.by_hand,
        repeated=monitor.repeated,
        overlooked=monitor.overlooked,
        weights_equal=not lost and _digest(_weights(live.run)) == reference.weights,
        metrics_equal=not lost and _digest(live.run / "metrics.jsonl") == reference.metrics,
        seconds=round(seconds, 1),
        seconds_lost=round(seconds - reference.seconds, 1),
        injected=log.injected or (scenario.name == RANDOM and log.kills > 0),
        refused=log.refused,
        lost=lost,
        silent=monitor.silent,
        hung=log.hung,
        kills=log.kills,
        difference=str(live.outcome().get("error", "")) if lost else _first_difference(live.run, reference),
        run=str(live.run),
    )


def _first_difference(run: Path, reference: Reference) -> str:
    lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    for number, (one, other) in enumerate(zip(lines, reference.log_lines, strict=False), start=1):
        if one != other:
            return f"metrics.jsonl line {number}: {one[:160]} instead of {other[:160]}"
    if len(lines) != len(reference.log_lines):
        return f"metrics.jsonl has {len(lines)} lines instead of {len(reference.log_lines)}"
    return ""


def _weights(run: Path) -> Path:
    """The weights of the finished model: all, or an adapter's."""
    return next((run / "model").glob("*.safetensors"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
