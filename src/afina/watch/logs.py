"""Logs of a run, `attempts/<id>/node<k>.log`: all, the end, or followed from attempt to attempt.

All processes of a node write into one file. A line of a rank other than 0 begins with `[rank K] `; output that bypasses Python has
no such prefix, and counts as rank 0. Before the first attempt there is only Slurm's log of the job.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from afina.errors import InputError, nearest
from afina.run.directory import RunDir
from afina.text import plural
from afina.watch.overview import summary_of
from afina.watch.reading import job_log

__all__ = ["LogSelection", "follow", "log_lines"]

_PREFIX = re.compile(rb"\[rank ([0-9]+)\] ")
#: Seconds between two reads of a file that does not grow, and between two queries of Slurm.
_POLL_S = 1.0
_QUERY_S = 15.0


@dataclass(frozen=True)
class LogSelection:
    """Which lines: an attempt (by default the newest), and a node or a rank (by default node 0)."""

    attempt: str | None = None
    node: int | None = None
    rank: int | None = None


def log_lines(run: RunDir, choice: LogSelection, last: int | None = None) -> Iterator[str]:
    """The lines of an attempt's log, or the last ones; before the first attempt those of Slurm's log of the job.

    Raises:
        InputError: no such attempt, node or rank; or there is no log yet.
    """
    names = run.attempt_names()
    if not names and choice.attempt is None:
        slurm_log = job_log(run.path)
        if slurm_log is None:
            summary = summary_of(run.path)
            raise InputError(
                f"{run.path}: no attempt has begun, there is no log ({summary.state}{f': {summary.why}' if summary.why else ''})",
                summary.remedy or "`afina logs RUN -f` waits for it",
            )
        yield f"afina: no attempt has begun; this is {slurm_log}\n"
        with slurm_log.open("rb") as file:
            yield from _chosen(file, None, last)
        return
    attempt = _attempt(names, choice.attempt)
    path, rank = _place(run, attempt, choice)
    if not path.exists():
        return
    with path.open("rb") as file:
        yield from _chosen(file, rank, last)


def follow(
    run: RunDir, choice: LogSelection, last: int | None = None, *, pause: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """As `log_lines`, then new lines, through later attempts, until the run has ended.

    With an attempt named, only its log. The end is read from the run directory; Slurm is queried at most every 15 seconds.

    Raises:
        InputError: no such attempt, node or rank.
    """
    current = _first_attempt(run, choice, pause)
    if current is None:
        yield f"afina: the run has ended before an attempt began: {summary_of(run.path).state}\n"
        yield from log_lines(run, choice, last)
        return
    end = _End(run)
    path, rank = _place(run, current, choice)
    position, torn = 0, b""
    while True:
        over = end.reached()  # before the last read: all lines written until then are shown
        grown, position = _grown(path, position)
        if grown:
            lines = (torn + grown).splitlines(keepends=True)
            torn = b"" if lines[-1].endswith(b"\n") else lines.pop()
            yield from _chosen(lines, rank, last)
        last = None
        following = _after(run, current)
        if not grown and torn and (following or over):
            yield from _chosen([torn + b"\n"], rank, None)
            torn = b""
        if not grown and following and not choice.attempt:
            outcome = run.outcome()
            how = (
                f"{outcome.outcome}: {outcome.cause}"
                if outcome and outcome.attempt == current
                else "without an outcome"
            )
            yield f"afina: attempt {current} has ended ({how}); attempt {following} continues\n"
            current, position = following, 0
            path, rank = _place(run, current, choice)
        elif not grown and (following or over):
            break
        elif not grown:
            pause(_POLL_S)
    yield f"afina: {end.state}\n"


class _End:
    """The end of a run; checked when an outcome appears, and now and then."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.state = run, "UNKNOWN"
        self._written: int | None = None
        self._queried = float("-inf")

    def reached(self) -> bool:
        try:
            written: int | None = self.run.outcome_file.stat().st_mtime_ns
        except OSError:
            written = None
        if written != self._written or time.monotonic() - self._queried > _QUERY_S:
            self._written, self._queried = written, time.monotonic()
            self.state = summary_of(self.run.path).state
        return self.state in ("FINISHED", "STOPPED", "FAILED", "PLANNED")


def _first_attempt(run: RunDir, choice: LogSelection, pause: Callable[[float], None]) -> str | None:
    """The attempt to start with: the named one, or the newest; waits for the first; None if the run ends before it."""
    end = _End(run)
    while not (names := run.attempt_names()):
        if choice.attempt is not None or end.reached():
            return _attempt(names, choice.attempt) if choice.attempt else None
        pause(_POLL_S)
    return _attempt(names, choice.attempt)


def _attempt(names: list[str], name: str | None) -> str:
    if name is None:
        return names[-1]
    if name in names:
        return name
    raise InputError(
        f"there is no attempt {name}; there are: {', '.join(names) or 'none'}",
        nearest(name, names) or "choose one of them",
    )


def _after(run: RunDir, attempt: str) -> str | None:
    names = run.attempt_names()
    later = names[names.index(attempt) + 1 :] if attempt in names else []
    return later[0] if later else None


def _place(run: RunDir, attempt: str, choice: LogSelection) -> tuple[Path, int | None]:
    """The log file, and the rank to select from it."""
    folder = run.attempts / attempt
    nodes, per_node = _layout(run, folder)
    if choice.rank is not None and not 0 <= choice.rank < nodes * per_node:
        raise InputError(
            f"there is no rank {choice.rank}: attempt {attempt} has {plural(nodes * per_node, 'process', 'processes')}",
            f"choose 0 to {nodes * per_node - 1}",
        )
    node = choice.node or 0
    if choice.rank is not None:
        node = choice.rank // per_node
    if not 0 <= node < nodes:
        raise InputError(f"there is no node {node}: attempt {attempt} has {nodes}", f"choose 0 to {nodes - 1}")
    return folder / f"node{node}.log", choice.rank


def _layout(run: RunDir, folder: Path) -> tuple[int, int]:
    """Nodes and processes per node of an attempt; as planned while it has not recorded them."""
    for file in (folder / "env.json", run.plan_file):
        try:
            geometry = json.loads(file.read_bytes())["geometry"]
            return int(geometry["nodes"]), int(geometry["processes_per_node"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return 1, 1


def _grown(path: Path, position: int) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            file.seek(position)
            grown = file.read()
    except FileNotFoundError:
        return b"", position
    return grown, position + len(grown)


def _chosen(lines: Iterator[bytes] | list[bytes], rank: int | None, last: int | None) -> Iterator[str]:
    """The lines of a rank without its prefix, or all lines."""
    kept: Iterator[bytes] = (text for line in lines if (text := _of_rank(line, rank)) is not None)
    for line in kept if last is None else deque(kept, maxlen=last):
        yield line.decode(errors="replace")


def _of_rank(line: bytes, rank: int | None) -> bytes | None:
    if rank is None:
        return line
    prefix = _PREFIX.match(line)
    if prefix is None:
        return line if rank == 0 else None
    return line[prefix.end() :] if int(prefix[1]) == rank else None
