"""The section `decisions`: probabilities and decisions that are fitted on eval when the training has ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from afina.recipe.keys.section import KeyedError, Section

__all__ = ["Decisions"]


class Decisions(Section):
    """Fits on eval for the model in `model/`, which predictions use: see `afina.statistics.decision_rule`."""

    temperature: bool = True
    thresholds: Literal["none", "f1"] = "none"

    def problems(self) -> Iterator[KeyedError]:
        if not self.temperature and self.thresholds == "none":
            yield KeyedError("asks for nothing", "temperature", remedy="leave `decisions` out")

    def misfit(self, task: str, num_labels: int | None = None) -> tuple[str, str, str] | None:
        """The first key that does not fit the task: key, problem, remedy; None where all fit.

        Args:
            num_labels: None where it is not known yet.
        """
        if task not in ("auto", "single-label", "multi-label"):
            return (
                "temperature",
                f"does not fit a {task} task: it has no labels of whole texts",
                "leave `decisions` out",
            )
        if self.thresholds != "none" and task == "single-label" and (num_labels or 2) > 2:
            problem = f"are for two classes or several labels a row, and there are {num_labels} classes"
            return "thresholds", problem, "leave it out: the most probable class is chosen"
        return None
