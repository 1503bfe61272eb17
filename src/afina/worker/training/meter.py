"""Meter: where the time of a run goes, and how much of the machine its real tokens use.

One stopwatch per process, always in exactly one part: the parts add up to the wall time since the attempt began. Counts are of
whole steps, over all processes, from the plan of the epoch. The checkpoint carries all sums from attempt to attempt: work after
the last checkpoint is not counted, as if it had not been done. Nothing here enters the metrics log.

Seconds are those of rank 0. On a GPU, where work is queued, the parts of a step cannot be separated: all of it is
`forward_backward`. The share of real tokens is that of rank 0's own batches. Not measured: GPUs.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from afina.schedule import Schedule
from afina.worker.compute import ranks
from afina.worker.compute.batches import Batching, epoch_steps
from afina.worker.compute.cpu import processor, resident_bytes
from afina.worker.compute.flops import Peak, device_peak

__all__ = ["PARTS", "Meter", "Work", "peak_memory_bytes", "seconds_since_launch", "share_of_peak"]

#: `other`: agreeing on what comes next, logging, and the time between epochs. `simple_models`: the baselines, when all is trained.
PARTS = ("startup", "input", "forward_backward", "optimizer", "evaluation", "saving", "simple_models", "other")

#: The parts of training proper; rates refer to them.
_TRAINING = ("input", "forward_backward", "optimizer", "other")


class Meter:
    """Seconds by part; examples, tokens and floating-point operations of all steps.

    Attributes:
        seconds: by part, over all attempts, without the current part.
        examples, tokens, flops: of whole steps, over all processes; flops of forward and backward.
        real, computed: tokens of rank 0's batches, and positions computed for them, padding included.
        evaluations: how many were finished.
        peak: of all processes together; None before it is measured.
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
        """Count time for `part` from now on; returns the previous part."""
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
        """Seconds of training proper: start-up, evaluations, saves and simple models left out."""
        running = time.perf_counter() - self._since if self._part in _TRAINING else 0.0
        return sum(self.seconds[part] for part in _TRAINING) + running

    def count_batches(self, batches: list[Any]) -> None:
        """Count the tokens of micro-batches, as the collators make them."""
        for batch in batches:
            self.computed += batch["input_ids"].numel()
            if "packing" in batch:
                self.real += batch["packing"].tokens
            else:
                self.real += int(batch["attention_mask"].sum())

    def count_step(self, examples: int, tokens: int, flops: float) -> None:
        """Count a step; `flops` of its forward and backward pass."""
        self.examples += examples
        self.tokens += tokens
        self.flops += flops

    def state(self) -> dict[str, Any]:
        """For the checkpoint; `restore` in the next attempt continues from it."""
        self.enter(self._part)
        sums = {name: getattr(self, name) for name in self._SUMS}
        return {
            "seconds": dict(self.seconds),
            **sums,
            "capacity": self._capacity_now(),
            "peak": self.peak and [self.peak.flops, *self._conditions],
            "before": [self._capacity, self._counted],
            "memory_bytes": max(self.memory_bytes, peak_memory_bytes()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Add the sums of earlier attempts to those of this one, which has only started up. On the same kind of machine the best peak counts for all."""
        self.enter(self._part)
        for part, seconds in state["seconds"].items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        for name in self._SUMS:
            setattr(self, name, getattr(self, name) + state[name])
        capacity, counted = state["capacity"], sum(state["seconds"][part] for part in _TRAINING)
        flops, *conditions = state.get("peak") or [0.0]  # checkpoints of afina before 0.2 have none
        if self.peak is not None and conditions == self._conditions:
            self.peak = Peak(max(flops, self.peak.flops), self.peak.source)
            capacity, counted = state["before"]
        self._capacity += capacity
        self._counted += counted
        self.memory_bytes = max(self.memory_bytes, state["memory_bytes"])

    def measure_peak(self, device: torch.device, matmul_dtype: str) -> None:
        """Measure the peak of all processes' devices at the same moment; the best measurement counts. Collective."""
        ranks.barrier()
        peak = device_peak(device, matmul_dtype)
        if (count := ranks.count()) > 1:
            peak = Peak(ranks.total(device, peak.flops), f"{peak.source}; the sum of {count} processes")
        if self.peak is None or self.peak.flops < peak.flops:
            self.peak = peak

    @property
    def _conditions(self) -> list[str]:
        """The conditions of the peak: number format, threads or GPU, processes; and the processor."""
        return [self.peak.source if self.peak else "", processor().name]

    def measure_memory(self, device: torch.device) -> None:
        """Record the most memory that any process has used. Collective."""
        self.memory_bytes = ranks.maximum(device, max(self.memory_bytes, peak_memory_bytes()))[0]

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
    """FLOPs done over FLOPs possible; None above 1: the peak was measured while other processes used the cores."""
    return _digits(flops / capacity) if capacity and flops <= capacity else None


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


class Work:
    """Rows of any step; its examples, tokens and floating-point operations of the forward pass, and the divisor of its loss, over all processes."""

    def __init__(
        self,
        lengths: np.ndarray[Any, Any],
        flops: np.ndarray[Any, Any],
        schedule: Schedule,
        seed: int,
        batching: Batching,
        divisors: np.ndarray[Any, Any] | None = None,
    ) -> None:
        """Args:
        lengths, flops: of each row, (N,).
        divisors: of each row, (N,): see `Loss.divisors`; None: 1 each.
        """
        self.divisors = divisors
        self.lengths, self.flops, self.schedule, self.seed, self.batching = lengths, flops, schedule, seed, batching
        self._epoch = -1
        self._tokens = self._flops = self._divisors = np.empty(0)

    def rows(self, step: int) -> np.ndarray[Any, Any]:
        """Row numbers of a step."""
        epoch, number = self.schedule.position(step)
        return self._steps(epoch)[number]

    def _steps(self, epoch: int) -> list[np.ndarray[Any, Any]]:
        return epoch_steps(self.lengths, self.schedule.global_batch, self.seed, epoch, self.batching)

    def __call__(self, step: int) -> tuple[int, int, float]:
        """Examples, tokens and operations of a step."""
        number = self._enter(step)
        return self.schedule.examples_of(step), int(self._tokens[number]), float(self._flops[number])

    def divisor(self, step: int) -> float:
        """The divisor of a step's sum of losses; 1 where all its rows have weight 0."""
        if self.divisors is None:
            return self.schedule.examples_of(step)
        number = self._enter(step)
        return float(self._divisors[number]) or 1.0

    def _enter(self, step: int) -> int:
        """The number of a step in its epoch, whose sums are ready then."""
        epoch, number = self.schedule.position(step)
        if epoch != self._epoch:
            rows = np.concatenate(self._steps(epoch))
            starts = np.arange(0, len(rows), self.schedule.global_batch)
            self._tokens = np.add.reduceat(self.lengths[rows], starts)
            self._flops = np.add.reduceat(self.flops[rows], starts)
            if self.divisors is not None:
                self._divisors = np.add.reduceat(self.divisors[rows], starts)
            self._epoch = epoch
        return number


def seconds_since_launch(attempt: Path) -> float:
    """Seconds since the launcher of an attempt started, from its `env.json`; without one, this process's processor time."""
    try:
        return max(0.0, time.time() - float(json.loads((attempt / "env.json").read_text(encoding="utf-8"))["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return time.process_time()


def peak_memory_bytes() -> int:
    """The most memory that this process has used: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resident_bytes(most=True)
