"""A run while it lives, seen from outside: its processes, what it has written, and the moments at which to strike.

It knows the run directory as the README describes it and the command lines of processes, nothing of afina's inside.
Moments are polled: a step is met within about ten milliseconds, a stage of a save exactly, because the ranks are frozen
before one looks.
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

__all__ = [
    "STAGES",
    "Live",
    "Missed",
    "Setting",
    "alive",
    "complete_steps",
    "descendants",
    "freeze",
    "last_step",
    "records",
    "signal_all",
]

T = TypeVar("T")

#: Stages of a save, in their order; `Live.freeze_at` says what is seen at each.
STAGES = ("opened", "half", "manifest", "renamed", "rotated")


class Missed(Exception):
    """The attempt was over before the moment came."""


@dataclass(frozen=True)
class Setting:
    """Where a run runs.

    Attributes:
        where: `here` (afina train, no container) or `slurm` (the image on the test cluster).
        nodes, per_node: nodes, and processes on each.
        tracker: Slurm's process tracker, linuxproc or cgroup.
    """

    where: str = "here"
    nodes: int = 1
    per_node: int = 1
    tracker: str = ""

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return " ".join(filter(None, (self.where, self.tracker, self.geometry)))

    @property
    def geometry(self) -> str:
        return str(self.per_node) if self.nodes == 1 else f"{self.nodes}x{self.per_node}"


class Live(ABC):
    """One run and what can be done to it; `here.HereRun` and `on_slurm.SlurmRun` are the two kinds."""

    setting: Setting
    run: Path
    #: Where the run directory's events ended when the current attempt was started.
    _events_before = 0

    # What a user does.

    @abstractmethod
    def start(self, changes: Mapping[str, Any], limit_min: int = 0) -> None:
        """Start the run with changed keys of the recipe; returns when its directory is claimed. Slurm knows a limit."""

    @abstractmethod
    def resume(self) -> None:
        """Go on with the run, as a user would; returns at once."""

    @abstractmethod
    def ended(self) -> str | None:
        """How the attempt ended, in words, or None while it goes on (requeued and waiting included)."""

    @abstractmethod
    def second(self) -> str:
        """Start the run a second time while it runs, and say how that ended."""

    # What is done to it.

    @abstractmethod
    def signal_host(self, number: signal.Signals) -> None:
        """To the process outside the container: `afina train`, or the batch script."""

    @abstractmethod
    def signal_step(self, number: signal.Signals) -> None:
        """To the processes of the step, as far as whoever signals a step reaches them; not to the host's process."""

    @abstractmethod
    def kill_everything(self) -> None:
        """SIGKILL to every process of the attempt at one instant, the host's process included."""

    @abstractmethod
    def clean_up(self) -> None:
        """End what is left of it, whatever state it is in."""

    # What is seen.

    def processes(self) -> dict[int, list[str]]:
        """Processes whose command line names the run directory, with their command lines."""
        found = {}
        for pid in _pids():
            with contextlib.suppress(OSError):
                argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                if any(word == str(self.run) for word in argv):
                    found[pid] = argv
        return {pid: argv for pid, argv in found.items() if pid != os.getpid()}

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of the training processes that live."""
        ranks = {}
        for pid, argv in self.processes().items():
            if "afina.worker" in argv and "train" in argv and "accelerate.commands.launch" not in argv and alive(pid):
                ranks[int(_environ(pid).get("RANK", "0"))] = pid
        return ranks

    def rank(self, number: int) -> int:
        """The process id of one rank.

        Raises:
            Missed: it is not there (any more).
        """
        try:
            return self.ranks()[number]
        except KeyError:
            raise Missed(f"rank {number} is not there") from None

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
        """Attempts that have begun: folders in `attempts/`."""
        return len(list((self.run / "attempts").glob("*/")))

    @property
    def finished(self) -> bool:
        return self.outcome().get("outcome") == "finished"

    # Moments.

    def until(self, reached: Callable[[], T], what: str, patience_s: float = 120, pause_s: float = 0.003) -> T:
        """Wait for a moment of this attempt; returns what `reached` returned.

        Raises:
            Missed: the attempt ended before, or did not come to it in `patience_s` seconds.
        """
        ends = time.monotonic() + patience_s
        looks = 0
        while not (value := reached()):
            looks += 1
            if looks % 20 == 0 and self.ended() is not None and not reached():
                raise Missed(f"the attempt ended before {what}")
            if time.monotonic() > ends:
                raise Missed(f"{what} did not come in {patience_s:g} s")
            time.sleep(pause_s)
        return value

    def mark(self) -> None:
        """What is written from here on belongs to a new attempt."""
        with contextlib.suppress(FileNotFoundError):
            self._events_before = (self.run / "events.jsonl").stat().st_size

    def wait_for_training(self) -> int:
        """Until this attempt has done a step; returns that step. What the log held before is not taken for it."""
        return self.until(self._first_step, "its first step", patience_s=240)

    def wait_for_step(self, step: int) -> int:
        """Until this attempt has logged `step`; returns the step it was seen at."""
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
        """Let the ranks go on by fractions of a millisecond until a save is at `stage`; returns their ids, frozen.

        opened: a staging folder with one file at most. half: three files or more, no manifest. manifest: it is there,
        not yet renamed. renamed: a new checkpoint. rotated: an old one is gone, or some of its files are.
        """
        self.wait_for_step(after)
        pids = list(self.ranks().values())
        folder = self.run / "checkpoints"
        freeze(pids)
        before = _tree(folder)
        try:
            for _ in range(60_000):
                if not all(map(alive, pids)):
                    raise Missed(f"the attempt ended before a save was {stage}")
                if _is_at(stage, before, _tree(folder)):
                    return pids
                signal_all(pids, signal.SIGCONT)
                time.sleep(0.0003)
                freeze(pids)
        except BaseException:
            signal_all(pids, signal.SIGCONT)
            raise
        signal_all(pids, signal.SIGCONT)
        raise Missed(f"no save was seen {stage}")


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


def complete_steps(run: Path) -> list[int]:
    """Steps whose checkpoint has its manifest, ascending."""
    return sorted(
        int(name.removeprefix("step-"))
        for name, files in _tree(run / "checkpoints").items()
        if name.startswith("step-") and name.removeprefix("step-").isdigit() and "manifest.json" in files
    )


def alive(pid: int) -> bool:
    return _state(pid) not in "ZX"


def freeze(pids: Iterable[int]) -> None:
    """SIGSTOP, and wait until they stand still."""
    pids = list(pids)
    signal_all(pids, signal.SIGSTOP)
    ends = time.monotonic() + 5
    while any(_state(pid) not in "TtZX" for pid in pids) and time.monotonic() < ends:
        pass


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Children of a process and theirs, the nearest first; not those whose parent has gone."""
    parents: dict[int, list[int]] = {}
    for child in _pids():
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(child)
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(0), [])
        found += children
        queue += children
    return found


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


def _pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def _environ(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
