"""Where the time of a run goes, and how much of the machine its real tokens use.

One stopwatch a process, which is always in one part: the parts add up to the wall time since the attempt began. Counts are of
whole steps, over all processes, from the plan of the epoch. Everything is summed up over attempts through the checkpoint: what
an attempt did after its last one is not in it, as if it had not been. Nothing here enters the metrics log.

Seconds are those of rank 0. On a GPU, where work is queued, the parts of a step are not told apart: all of it is
`forward_backward` (not measured on a GPU). The share of real tokens is that of rank 0's own batches.
"""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afina.schedule import Schedule
from afina.worker.compute.batches import Batching, epoch_steps
from afina.worker.compute.flops import Peak

__all__ = ["PARTS", "Meter", "Work", "launched", "peak_memory_bytes", "share_of_peak"]

#: `other`: agreeing on what is next, logging, and what lies between the epochs.
PARTS = ("startup", "input", "forward_backward", "optimizer", "evaluation", "saving", "other")

#: Those that make up training proper, by which rates are measured.
_TRAINING = ("input", "forward_backward", "optimizer", "other")


class Meter:
    """Seconds by part; examples, tokens and floating-point operations of the steps that were made.

    Attributes:
        seconds: by part, over all attempts, without the part that is under way.
        examples, tokens, flops: of whole steps, over all processes; flops of forward and backward.
        real, computed: tokens of rank 0's batches, and positions computed for them, padding included.
        evaluations: how many were finished.
        peak: of all processes together; None before it is known.
        memory_bytes: the most that any process has used.
    """

    _SUMS = ("examples", "tokens", "flops", "real", "computed", "evaluations")

    def __init__(self, launched_s: float = 0.0) -> None:
        """Args:
        launched_s: seconds since the attempt began.
        """
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.examples = self.tokens = self.real = self.computed = self.evaluations = 0
        self.flops = 0.0
        self.peak: Peak | None = None
        self.memory_bytes = 0
        self._part, self._since = "startup", time.perf_counter() - launched_s
        # FLOPs that the hardware of earlier attempts could have done, and their seconds of training.
        self._capacity = self._counted = 0.0

    def enter(self, part: str) -> str:
        """From now on time belongs to `part`; returns the part before."""
        now, before = time.perf_counter(), self._part
        self.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    @property
    def training_s(self) -> float:
        """Seconds of training proper: start-up, evaluations and saves left out."""
        running = time.perf_counter() - self._since if self._part in _TRAINING else 0.0
        return sum(self.seconds[part] for part in _TRAINING) + running

    def saw(self, batches: list[Any]) -> None:
        """Count the tokens of micro-batches, as the collators make them."""
        for batch in batches:
            self.computed += batch["input_ids"].numel()
            if "packing" in batch:
                self.real += sum(batch["packing"].lengths)
            else:
                self.real += int(batch["attention_mask"].sum())

    def did(self, examples: int, tokens: int, flops: float) -> None:
        """Count a step; `flops` of its forward pass."""
        self.examples += examples
        self.tokens += tokens
        self.flops += 3 * flops

    def state(self) -> dict[str, Any]:
        """For the checkpoint; `take_over` in the next attempt continues from it."""
        self.enter(self._part)
        sums = {name: getattr(self, name) for name in self._SUMS}
        return {
            "seconds": dict(self.seconds),
            **sums,
            "capacity": self._capacity_now(),
            "memory_bytes": max(self.memory_bytes, peak_memory_bytes()),
        }

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; this attempt's start-up is kept."""
        self.enter(self._part)
        for part, seconds in state["seconds"].items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        for name in self._SUMS:
            setattr(self, name, getattr(self, name) + state[name])
        self._capacity += state["capacity"]
        self._counted += sum(state["seconds"][part] for part in _TRAINING)
        self.memory_bytes = max(self.memory_bytes, state["memory_bytes"])

    def _capacity_now(self) -> float:
        return self._capacity + (self.peak.flops if self.peak else 0.0) * (self.training_s - self._counted)

    def summary(self, steps: int) -> dict[str, Any]:
        """`Outcome.utilisation`.

        Args:
            steps: optimizer steps of the run so far.
        """
        self.enter(self._part)
        trained, capacity = self.training_s, self._capacity_now()
        return {
            "tokens_per_second": round(self.tokens / trained, 1) if trained else None,
            "real_token_share": round(self.real / self.computed, 4) if self.computed else None,
            "mfu": share_of_peak(self.flops, capacity),
            "peak_flops": _digits(self.peak.flops) if self.peak else None,
            "peak_source": self.peak.source if self.peak else None,
            "peak_memory_gb": round(self.memory_bytes / 1e9, 3) or None,
            "examples_per_step": round(self.examples / steps, 3) if steps else None,
            "seconds_by_part": {part: round(seconds, 3) for part, seconds in self.seconds.items()},
        }


def share_of_peak(flops: float, capacity: float) -> float | None:
    """FLOPs done over FLOPs that were possible; None above 1: the peak was measured while others used the cores."""
    return _digits(flops / capacity) if capacity and flops <= capacity else None


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


class Work:
    """Examples, tokens and floating-point operations of the forward pass of any step, over all processes."""

    def __init__(
        self,
        lengths: np.ndarray[Any, Any],
        flops: np.ndarray[Any, Any],
        schedule: Schedule,
        seed: int,
        batching: Batching,
    ) -> None:
        """Args:
        lengths, flops: of each row, (N,).
        """
        self.lengths, self.flops, self.schedule, self.seed, self.batching = lengths, flops, schedule, seed, batching
        self._epoch = -1
        self._tokens = self._flops = np.empty(0)

    def __call__(self, step: int) -> tuple[int, int, float]:
        """Of optimizer step `step`, which counts from 1."""
        epoch, number = self.schedule.position(step)
        if epoch != self._epoch:
            batch = self.schedule.global_batch
            rows = np.concatenate(epoch_steps(self.lengths, batch, self.seed, epoch, self.batching))
            starts = np.arange(0, len(rows), batch)
            self._tokens = np.add.reduceat(self.lengths[rows], starts)
            self._flops = np.add.reduceat(self.flops[rows], starts)
            self._epoch = epoch
        return self.schedule.examples_of(step), int(self._tokens[number]), float(self._flops[number])


def launched(attempt: Path) -> float:
    """Seconds since the launcher of an attempt began; where it left no word, since this process uses the processor."""
    try:
        return max(0.0, time.time() - float(json.loads((attempt / "env.json").read_text(encoding="utf-8"))["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return time.process_time()


def peak_memory_bytes() -> int:
    """The most memory that this process has used: of the GPU where there is one, else resident (getrusage(2))."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
