"""Sizes of a training in bytes. Pure arithmetic, the same on the host and in the worker, which computes them from the model
(`afina.worker.model.training_sizes`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Bytes.

    Attributes:
        weights: all of them in float32, as a process reads them.
        state: weights as they are kept while training, gradients of the trained ones, and the optimizer's state; all processes together
            where the model is sharded.
        checkpoint: one of them: all weights, or with an adapter the trained ones; and the optimizer's state.
        exported: the weights in `model/`.
    """

    weights: int
    state: int
    checkpoint: int
    exported: int

    def of_run(self, keep: int, *, best: bool, checkpoint: int | None = None) -> int:
        """The most that a run directory holds: the kept checkpoints, the one that is being written, the best one, the model.

        Args:
            keep: how many checkpoints are kept.
            best: the best one is kept too.
            checkpoint: the size of one, where it was measured.
        """
        return (keep + 1 + best) * (checkpoint or self.checkpoint) + self.exported
