"""A live run, observed from outside: its processes, its files, and waiting for the moment of a fault.

Uses only the run directory as the README describes it and the command lines of processes, nothing internal to afina.
Moments are polled: a step is caught within about ten milliseconds, a stage of a save exactly, because the ranks are
frozen before each check.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.processes import alive, environ, pids, signal_all, state

__all__ = [
    "STAGES",
    "LiveRun",
    "TooLate",
    "Setting",
    "committed_steps",
    "freeze",
    "last_step",
    "records",
]

T = TypeVar("T")

#: Stages of a save, in their order; see `LiveRun.freeze_at`.
STAGES = ("opened", "half", "manifest", "renamed", "rotated")


class TooLate(Exception):
    """The attempt ended before the moment came."""


@dataclass(frozen=True)
class Setting:
    """Where a run runs.

    Attributes:
        where: `local` (afina train, no container) or `slurm` (the image on the test cluster).
        nodes, per_node: nodes, and processes on each.
        tracker: Slurm's process tracker, linuxproc or cgroup.
        via: `sbatch`, or `submitit`: from Python, as `afina.submit` does it.
    """

    where: str = "local"
    nodes: int = 1
    per_node: int = 1
    tracker: str = ""
    via: str = "sbatch"

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return " ".join(filter(None, (self.where, self.tracker, self.via.replace("sbatch", ""), self.geometry)))

    @property
    def geometry(self) -> str:
        return str(self.per_node) if self.nodes == 1 else f"{self.nodes}x{self.per_node}"


class LiveRun(ABC):
    """One run and the faults it can be given; `LocalRun` and `SlurmRun` are the two kinds."""

    setting: Setting
    run: Path
    #: Seconds that the worker's start takes on an idle machine, about.
    start_s = 5.0
    #: Bytes of events.jsonl when the current attempt started.
    _events_before = 0

    # What a user does

    @abstractmethod
    def start(self, changes: Mapping[str, Any], limit_min: int = 0) -> None:
        """Start the run with changed keys of the recipe; returns when its directory is claimed. `limit_min` only under Slurm."""

    @abstractmethod
    def resume(self) -> None:
        """Resume the run, as a user would; returns at once."""

    @abstractmethod
    def ended(self) -> str | None:
        """How the attempt ended, in words, or None while it lives (requeued and pending included)."""

    @abstractmethod
    def second(self) -> str:
        """Start the run a second time while it runs; returns how that ended."""

    # Faults

    @abstractmethod
    def signal_host(self, number: signal.Signals) -> None:
        """Signal the host process: `afina train`, or the batch script."""

    @abstractmethod
    def signal_step(self, number: signal.Signals) -> None:
        """Signal the step as Slurm would: the processes that its tracker reaches, not the host process."""

    @abstractmethod
    def kill_everything(self) -> None:
        """SIGKILL every process of the attempt at one instant, the host process included."""

    @abstractmethod
    def clean_up(self) -> None:
        """End what is left of the run, whatever its state."""

    # Observation

    def processes(self) -> dict[int, list[str]]:
        """Processes whose command line names the run directory, with their command lines."""
        found = {}
        for pid in pids():
            with contextlib.suppress(OSError):
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                if any(word == str(self.run) for word in argv):
                    found[pid] = argv
        return {pid: argv for pid, argv in found.items() if pid != os.getpid()}

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of the live training processes."""
        ranks = {}
        for pid, argv in self.processes().items():
            if "afina.worker" in argv and "train" in argv and "accelerate.commands.launch" not in argv and alive(pid):
                ranks[int(environ(pid).get("RANK", "0"))] = pid
        return ranks

    def rank(self, number: int) -> int:
        """The process id of one rank.

        Raises:
            TooLate: it does not exist (any more).
        """
        try:
            return self.ranks()[number]
        except KeyError:
            raise TooLate(f"rank {number} does not run") from None

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        """The records of `events.jsonl` after its first `since` bytes."""
        return records(self.run / "events.jsonl", since)

    def step(self) -> int:
        """The last step in the metrics log."""
        return last_step(self.run / "metrics.jsonl")

    def outcome(self) -> dict[str, Any]:
        try:
            value = json.loads((self.run / "outcome.json").read_text())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def attempts(self) -> int:
        """Number of attempts so far: folders in `attempts/`."""
        return len(list((self.run / "attempts").glob("*/")))

    @property
    def finished(self) -> bool:
        return self.outcome().get("outcome") == "finished"

    # Moments

    def until(self, reached: Callable[[], T], what: str, patience_s: float = 120, pause_s: float = 0.003) -> T:
        """Wait for a moment of this attempt; returns what `reached` returned.

        Raises:
            TooLate: the attempt ended before, or did not reach it within `patience_s` seconds.
        """
        ends = time.monotonic() + patience_s
        polls = 0
        while not (value := reached()):
            polls += 1
            if polls % 20 == 0 and self.ended() is not None and not reached():
                raise TooLate(f"the attempt ended before {what}")
            if time.monotonic() > ends:
                raise TooLate(f"{what} did not come in {patience_s:g} s")
            time.sleep(pause_s)
        return value

    def mark(self) -> None:
        """From here on new records belong to a new attempt."""
        with contextlib.suppress(FileNotFoundError):
            self._events_before = (self.run / "events.jsonl").stat().st_size

    def wait_for_training(self) -> int:
        """Wait until this attempt has done a step; returns it. Earlier log lines do not count."""
        return self.until(self._first_step, "its first step", patience_s=240, pause_s=0.01)

    def wait_for_step(self, step: int) -> int:
        """Wait until this attempt has logged `step`; returns the last logged step."""
        first = self.wait_for_training()
        if first > step:
            return self.step()
        return self.until(lambda: (seen := self.step()) >= step and seen, f"step {step}", patience_s=240)

    def _first_step(self) -> int:
        for event in self.events(self._events_before):
            if event.get("event") == "first_step":
                return int(event["step"])
        return 0

    def freeze_at(self, stage: str, after: int) -> list[int]:
        """Step the ranks by fractions of a millisecond until a save is at `stage`; returns their process ids, frozen.

        opened: a staging folder with one file at most. half: three files or more, no manifest. manifest: written,
        not yet renamed. renamed: a new checkpoint. rotated: an old checkpoint, or some of its files, are deleted.
        """
        self.wait_for_step(after)
        ranks = list(self.ranks().values())
        folder = self.run / "checkpoints"
        freeze(ranks)
        before = _tree(folder)
        try:
            for _ in range(60_000):
                if not all(map(alive, ranks)):
                    raise TooLate(f"the attempt ended before a save was {stage}")
                now = _tree(folder)
                if _is_at(stage, before, now):
                    return ranks
                if stage == "rotated":
                    before = now  # a checkpoint that came since may be the one that is removed
                signal_all(ranks, signal.SIGCONT)
                time.sleep(0.0003)
                freeze(ranks)
        except BaseException:
            signal_all(ranks, signal.SIGCONT)
            raise
        signal_all(ranks, signal.SIGCONT)
        raise TooLate(f"no save was seen {stage}")


def last_step(log: Path) -> int:
    """The step in the last whole line of a metrics log; 0 without one."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return 0


def committed_steps(run: Path) -> list[int]:
    """Steps whose checkpoint has its manifest, ascending."""
    return sorted(
        int(name.removeprefix("step-"))
        for name, files in _tree(run / "checkpoints").items()
        if name.startswith("step-") and name.removeprefix("step-").isdigit() and "manifest.json" in files
    )


def freeze(chosen: Iterable[int]) -> None:
    """SIGSTOP, and wait until they have stopped."""
    chosen = list(chosen)
    signal_all(chosen, signal.SIGSTOP)
    ends = time.monotonic() + 5
    while any(state(pid) not in "TtZX" for pid in chosen) and time.monotonic() < ends:
        pass


def _is_at(stage: str, before: Mapping[str, frozenset[str]], now: Mapping[str, frozenset[str]]) -> bool:
    staged = [files for name, files in now.items() if name.startswith(".staging-")]
    if stage == "opened":
        return any(len(files) <= 1 for files in staged)
    if stage == "half":
        return any(len(files) >= 3 and "manifest.json" not in files for files in staged)
    if stage == "manifest":
        return any("manifest.json" in files for files in staged)
    steps = {name for name in now if name.startswith("step-")}
    if stage == "renamed":
        return bool(steps - before.keys())
    return any(name.startswith("step-") and not files <= now.get(name, frozenset()) for name, files in before.items())


def _tree(folder: Path) -> dict[str, frozenset[str]]:
    """Names of the folders in `folder`, and of the files in each."""
    tree: dict[str, frozenset[str]] = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for folder_entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                tree[folder_entry.name] = frozenset(entry.name for entry in os.scandir(folder_entry))
    return tree


def records(path: Path, since: int = 0) -> list[dict[str, Any]]:
    """The records of a JSON Lines file after its first `since` bytes; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(since)
            raw = file.read()
    except OSError:
        return []
    found = []
    for line in raw.split(b"\n"):
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
