"""The log of a run: what each process prints, and the lines at the start and at the end.

All ranks of a node write into one file. Ranks other than 0 prefix their lines with `[rank K] `, which `afina logs --rank K`
reads. Not covered: what a library writes past Python (NCCL, the stacks of a hanging process).
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO, cast

from afina.run.directory import RunDir, evaluations_of
from afina.run.outcome import Outcome, part_in_words
from afina.run.plan import Geometry, Plan
from afina.text import CLEAR_LINE, aligned, can_draw, plural, size_in_words

__all__ = ["bar_stream", "introduction", "mark_lines", "metrics_table", "say", "usage_lines"]


def mark_lines(rank: int) -> None:
    """Prefix what this process prints from now on; rank 0 has no prefix. On a terminal a line takes the place of the bar."""
    if can_draw(sys.stderr):
        terminal = sys.stderr
        sys.stderr = cast(TextIO, _BesideBar(terminal))
        for name in (None, *logging.root.manager.loggerDict):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is terminal:
                    handler.setStream(sys.stderr)
    if rank:
        sys.stdout = cast(TextIO, _Marked(sys.stdout, rank))
        sys.stderr = cast(TextIO, _Marked(sys.stderr, rank))


def say(*lines: str) -> None:
    for line in lines:
        print(f"afina: {line}", flush=True)


def introduction(plan: Plan, geometry: Geometry, task: str, rows: dict[str, int], device: str) -> list[str]:
    """Two lines: the task, model and data; the processes and their batches.

    Args:
        rows: of each split.
    """
    counts = ", ".join(f"{part} {count}" for part, count in rows.items())
    return [
        f"{plan.recipe.name}: {task}, {plan.recipe.model}; rows: {counts}",
        f"{plural(geometry.num_processes, 'process', 'processes')} on {plural(geometry.nodes, 'node')}, {device}; global batch {geometry.global_batch} = "
        f"{geometry.batch_per_device} × {geometry.accumulation} × {geometry.num_processes}",
    ]


def metrics_table(run: RunDir, metric_names: list[str]) -> str:
    """The table of the Transformers tutorial: one line per evaluation, with the mean training loss since the one before."""
    logged = run.metrics()
    scalar = [m for m in metric_names if any(isinstance(line.get(f"eval_{m}"), float) for line in logged)]
    head = ["epoch", "training loss", "validation loss", *scalar]
    rows: list[list[str]] = []
    for line, training_loss in evaluations_of(logged):
        values = [line.get(f"eval_{name}") for name in scalar]
        cells = [training_loss, line["eval_loss"], *(v if isinstance(v, float) else None for v in values)]
        rows.append([f"{line['epoch']:g}", *("-" if v is None else f"{v:.6f}" for v in cells)])
    lines = aligned([head, *rows], right=range(len(head)))
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:], ""])


def usage_lines(outcome: Outcome) -> list[str]:
    """How the run used the machine: a line of rates, and one of seconds by part."""
    used = outcome.utilisation
    by_part = used.get("seconds_by_part", {})
    parts = [f"{seconds:.1f} {part_in_words(part)}" for part, seconds in by_part.items() if seconds >= 0.05]
    rates = [
        f"{outcome.samples_per_second:.1f} examples/s" if outcome.samples_per_second else "",
        f"{used['tokens_per_second']:,.0f} real tokens/s" if used.get("tokens_per_second") else "",
        f"{used['real_token_share']:.1%} of all tokens are real" if used.get("real_token_share") else "",
        f"{used['mfu']:.1%} of {used['peak_flops'] / 1e12:.3g} TFLOP/s ({used['peak_source']})"
        if used.get("mfu")
        else "",
        f"{size_in_words(used['peak_memory_gb'] * 1e9)} at most" if used.get("peak_memory_gb") else "",
    ]
    lines = [", ".join(filter(None, rates)), f"seconds: {', '.join(parts)}" if parts else ""]
    return [line for line in lines if line]


def bar_stream() -> TextIO:
    """Where a bar is drawn: the terminal itself."""
    return cast(TextIO, getattr(sys.stderr, "terminal", sys.stderr))


class _BesideBar:
    """A terminal on which each line takes the place of a bar; the bar's next refresh draws it below."""

    def __init__(self, terminal: TextIO) -> None:
        self.terminal, self._at_start = terminal, True

    def write(self, text: str) -> int:
        if text:
            self.terminal.write(CLEAR_LINE * self._at_start + text)
            self._at_start = text.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)


class _Marked:
    """A text stream that prefixes each line with the rank and writes whole lines in one piece."""

    def __init__(self, stream: TextIO, rank: int) -> None:
        self._stream, self._mark, self._line = stream, f"[rank {rank}] ", ""

    def write(self, text: str) -> int:
        *whole, self._line = (self._line + text).split("\n")
        if whole:
            self._stream.write("".join(f"{self._mark}{line}\n" for line in whole))
        return len(text)

    def flush(self) -> None:
        if self._line:
            self.write("\n")
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
