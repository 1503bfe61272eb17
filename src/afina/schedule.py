"""The schedule of a run: steps, examples, evaluations and saves. Pure arithmetic, the same on the host and in the worker.

Steps are optimizer steps and count from 1. Every epoch goes through all rows; its last step is short where the global batch does not
divide them. The last epoch may be a part of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["DEFAULT_EPOCHS", "Schedule", "embedding_seconds", "stop_lead_s"]

DEFAULT_EPOCHS = 3.0
#: Time to embed texts for a simple model beside a run: a share of the training's, within limits.
_EMBEDDING_S, _EMBEDDING_SHARE = (10.0, 60.0), 0.1
#: For inexact clocks, and for Slurm.
_INEXACT_S = 15.0
Every = int | Literal["epoch"]


@dataclass(frozen=True)
class Schedule:
    """The steps of a whole run.

    Attributes:
        rows: of the train split.
        global_batch: examples of a step, over all processes.
        total_steps: of the whole run.
        evaluate: steps between two evaluations, or `epoch`; None where there is nothing to evaluate on.
        save_every: steps between two checkpoints, or `epoch`.
    """

    rows: int
    global_batch: int
    total_steps: int
    evaluate: Every | None = "epoch"
    save_every: Every = "epoch"

    @classmethod
    def of(
        cls,
        rows: int,
        global_batch: int,
        *,
        epochs: float | None = None,
        max_steps: int | None = None,
        evaluate: Every | None = "epoch",
        save_every: Every = "epoch",
    ) -> Schedule:
        """The schedule of so many epochs, or of `max_steps` steps where they are given."""
        per_epoch = -(-rows // global_batch)
        # As `transformers.Trainer` counts, float for float.
        total = max_steps or math.ceil((epochs or DEFAULT_EPOCHS) * per_epoch)
        return cls(rows, global_batch, total, evaluate, save_every)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.global_batch)

    def position(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its number in the epoch; both count from 0."""
        return divmod(step - 1, self.steps_per_epoch)

    def examples_of(self, step: int) -> int:
        """Examples of one step: the global batch, or what is left of the epoch."""
        return min(self.global_batch, self.rows - self.position(step)[1] * self.global_batch)

    def examples_after(self, step: int) -> int:
        """Examples of all steps up to and with `step`."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.rows + steps * self.global_batch

    def evaluates_at(self, step: int) -> bool:
        """True if an evaluation follows `step`: the end of an interval, or of the run."""
        return self.evaluate is not None and (step >= self.total_steps or step % self._steps(self.evaluate) == 0)

    def saves_at(self, step: int) -> bool:
        """True if a checkpoint follows `step`; others are written by the clock, and when the run is asked to stop."""
        return step >= self.total_steps or step % self._steps(self.save_every) == 0

    @property
    def evaluations(self) -> int:
        """Evaluations of the whole run."""
        return self.evaluations_after(0)

    def evaluations_after(self, step: int) -> int:
        """Evaluations that are left when `step` and its own evaluation are done."""
        if self.evaluate is None or step >= self.total_steps:
            return 0
        every = self._steps(self.evaluate)
        return self.total_steps // every - step // every + int(self.total_steps % every > 0)

    @property
    def saves(self) -> float:
        """Checkpoints of the whole run that are written by step."""
        return self.total_steps / self._steps(self.save_every)

    def _steps(self, every: Every) -> int:
        return self.steps_per_epoch if every == "epoch" else every


def embedding_seconds(training_s: float) -> float:
    """The longest time that frozen embeddings beside a run may take to compute, after so many seconds of training."""
    shortest, longest = _EMBEDDING_S
    return min(max(shortest, _EMBEDDING_SHARE * training_s), longest)


def stop_lead_s(save_s: float, step_s: float) -> float:
    """How long before the deadline a stop begins: two saves, three steps, and 15 s for inexact clocks and Slurm.

    Args:
        save_s, step_s: the longest of them, in seconds.
    """
    return _INEXACT_S + 2 * save_s + 3 * step_s
