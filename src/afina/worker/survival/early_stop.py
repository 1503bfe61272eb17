"""The end of a training that no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from afina.text import plural

__all__ = ["EarlyStop"]


@dataclass
class EarlyStop:
    """Counts evaluations without improvement; checkpoints carry the counters.

    Attributes:
        metric: its name, without prefix.
        lower: less is better.
        best: the value to improve on; None before the first one.
        waited: evaluations since then.
        stopped: the training has ended by it.
    """

    metric: str
    lower: bool
    patience: int
    min_delta: float
    best: float | None = None
    waited: int = 0
    stopped: bool = False

    def count(self, value: float | None) -> bool:
        """Count an evaluation; returns whether the patience is spent. A value that is not defined (None, NaN) is no improvement."""
        if value is not None and math.isfinite(value) and self._improves(value):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return True
        return (self.best - value if self.lower else value - self.best) > self.min_delta

    @property
    def reason(self) -> str:
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return f"no improvement of eval {self.metric}{by} for {plural(self.waited, 'evaluation')}"

    def state(self) -> dict[str, Any]:
        """The counters, for a checkpoint."""
        return {"best": self.best, "waited": self.waited, "stopped": self.stopped}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited, self.stopped = state["best"], state["waited"], state["stopped"]
