"""The end of a training before its last step: it no longer improves, or it is a trial of a search and behind the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.files import read_json
from afina.run.directory import PRUNING, RunDir, is_run_dir
from afina.text import plural

__all__ = ["EarlyStop", "MedianStop"]

#: The fewest finished trials that a trial is compared with.
_FEWEST = 5


@dataclass
class EarlyStop:
    """Counts evaluations without improvement; checkpoints carry the counters.

    Attributes:
        metric: its name, without prefix.
        lower: less is better.
        best: the value to improve on; None before the first one.
        waited: evaluations since then; 0 before the first value, as there is nothing to improve on.
        undefined: those of them without a value.
        stopped: the training has ended by it.
    """

    metric: str
    lower: bool
    patience: int
    min_delta: float
    best: float | None = None
    waited: int = 0
    undefined: int = 0
    stopped: bool = False

    def count(self, value: float | None) -> bool:
        """Count an evaluation; returns whether the patience is spent. A value that is not defined (None, NaN) is no improvement on one that was."""
        defined = value if value is not None and math.isfinite(value) else None
        if defined is not None and self._improves(defined):
            self.best, self.waited, self.undefined = defined, 0, 0
        elif self.best is not None:
            self.waited += 1
            self.undefined += defined is None
        return self.waited >= self.patience

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return True
        return (self.best - value if self.lower else value - self.best) > self.min_delta

    @property
    def reason(self) -> str:
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        without = f", {self.undefined} of them without a value" if self.undefined else ""
        return f"no improvement of eval {self.metric}{by} for {plural(self.waited, 'evaluation')}{without}"

    def state(self) -> dict[str, Any]:
        """The counters, for a checkpoint."""
        return {"best": self.best, "waited": self.waited, "undefined": self.undefined, "stopped": self.stopped}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited, self.stopped = state["best"], state["waited"], state["stopped"]
        self.undefined = state.get("undefined", 0)  # checkpoints of afina before 0.2 do not have it


@dataclass
class MedianStop:
    """Prunes a trial of a search whose best value is worse than the median of the best values that the finished trials had by the same epoch.

    This is the median rule of Optuna's MedianPruner, computed from the metrics logs of the runs beside this one: trials that were pruned
    do not count, and the first five end by themselves.

    Attributes:
        metric: as the metrics log names it.
        lower: less is better.
        reason: why this trial has ended; None while it has not. Checkpoints carry it.
    """

    metric: str
    lower: bool
    reason: str | None = None
    _finished: dict[Path, list[tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunDir) -> MedianStop | None:
        """That of a run which a search with `--prune` has made."""
        about = read_json(run.path / PRUNING)
        return cls(about["metric"], about["lower"]) if about else None

    def judge(self, run: RunDir, epoch: float) -> str | None:
        """Why the trial `run` is to end after the evaluation at `epoch`; None: it continues."""
        best = max if not self.lower else min
        own = [value for _, value in self._values(run)]
        for folder in sorted(run.path.parent.iterdir()):
            if folder not in self._finished and folder != run.path and is_run_dir(folder):
                outcome = RunDir(folder).outcome()
                if outcome is not None and outcome.outcome == "finished":
                    self._finished[folder] = [] if outcome.pruned else self._values(RunDir(folder))
        until = [[value for at, value in values if at <= round(epoch, 6)] for values in self._finished.values()]
        others = [best(values) for values in until if values]
        if not own or len(others) < _FEWEST:
            return None
        mine, middle = best(own), statistics.median(others)
        if best(mine, middle) == mine:
            return None
        compared = f"the median of {len(others)} finished trials was {middle:.4g}"
        return f"pruned: {self.metric} {mine:.4g} by epoch {epoch:.4g}, {compared}"

    def _values(self, run: RunDir) -> list[tuple[float, float]]:
        """Epoch and value of the evaluations that have one."""
        lines = ((line.get("epoch"), line.get(self.metric)) for line in run.metrics())
        return [
            (epoch, value)
            for epoch, value in lines
            if epoch is not None and isinstance(value, int | float) and math.isfinite(value)
        ]
