"""Running and measuring commands, for the benches: their environment, seconds, memory, medians and ranges. Linux only."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["AFINA", "Measured", "environment_of", "measured", "ranged", "spread"]

#: The command line of this checkout.
AFINA = (sys.executable, "-m", "afina")


@dataclass(frozen=True)
class Measured:
    """One finished command.

    Attributes:
        memory: the largest memory of its processes together, in bytes (proportional set size: shared pages count once).
    """

    out: str
    seconds: float
    cpu_seconds: float
    memory: int


def environment_of(folder: Path, threads: int) -> dict[str, str]:
    """An environment without network in which afina and Hugging Face keep their files below `folder`."""
    (folder / "scratch").mkdir(exist_ok=True, parents=True)
    return {
        **os.environ,
        "AFINA_SCRATCH": str(folder / "scratch"),
        "AFINA_RUNTIME": "none",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "true",
    }


def measured(argv: Sequence[str], environment: Mapping[str, str], text: str | None = None) -> Measured:
    """Run a command to its end, with `text` on its standard input.

    Memory is read twice a second, or less often so that reading takes at most 2 % of a core.

    Raises:
        SystemExit: the command failed; with the end of its output.
    """
    began, before = time.perf_counter(), os.times()
    most, over = [0], threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )

        def watch() -> None:
            pause = 0.5
            while not over.wait(pause):
                start = time.perf_counter()
                most[0] = max(most[0], _bytes_below(process.pid))
                # Walking through the pages of gigabytes takes a tenth of a second of a core that others train on.
                pause = max(0.5, 50 * (time.perf_counter() - start))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        out, _ = process.communicate(text)
        over.set()
        thread.join()
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"error: {' '.join(argv)[:500]}\n{out[-2000:]}\n{errors.read()[-4000:]}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(out, time.perf_counter() - began, cpu, most[0])


def _bytes_below(root: int) -> int:
    """Proportional set size of a process and all its descendants (proc(5))."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    wanted, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in wanted} - wanted
        wanted |= more
        grown = bool(more)
    total = 0
    for pid in wanted:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def spread(values: Sequence[float]) -> list[float]:
    """Median, lowest, highest."""
    return [statistics.median(values), min(values), max(values)]


def ranged(values: Sequence[float], form: str = ".2f") -> str:
    """`median [lowest–highest]`."""
    middle, low, high = (format(value, form) for value in spread(values))
    return middle if len(values) == 1 else f"{middle} [{low}–{high}]"
