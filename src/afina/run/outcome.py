"""How an attempt ended, as the run directory keeps it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field, model_validator

from afina.errors import EXIT_ENVIRONMENT, EXIT_INPUT, Failure

__all__ = ["ANOTHER_RUN", "Outcome", "data_warnings", "part_in_words"]

#: Causes of failures that no attempt of the same run gets past: its recipe, its data or its code must change.
ANOTHER_RUN = ("loss", "code")

#: How an afina before 0.2 worded the one data warning that spoils a number.
_SHARED = re.compile(r"rows of (eval|test) are in train too")


class Outcome(BaseModel):
    """How the last attempt ended, as the worker recorded it (or its supervisor, where the worker could not).

    Attributes:
        outcome: finished, stopped (resumable) or failed.
        exit_code: 0, 2, 3, 4 or 75.
        attempt: the attempt that wrote it.
        global_step: optimizer steps done.
        metrics: `eval_*` (and `test_*`) of the model in `model/`.
        samples_per_second: training examples per second of training; evaluations, saves and simple models are left out.
        utilisation: how the machine was used, over all attempts as far as checkpoints carry it on: real tokens per second,
            the share of real tokens among those computed, mfu (model-FLOP utilisation) and the peak (FLOP/s of all processes) it
            refers to, the most memory of a process, examples per step, wall seconds by part.
        seconds: wall time of all attempts up to here, start-up included.
        attempts: how many there were.
        failure: what failed. A file of an afina before 0.2 has its text alone, in `error`.
        error: its text, message and remedy.
        cause: one word. Of a stop: asked, signal or limit. Of a failure: loss, code, stall, memory, disk, node, start (the worker never
            began), killed, or the exception's name.
        warnings: what the run's own numbers say against it: a constant prediction, a diverging loss, a model that is not
            better than the majority class, a metric that is undefined; and what the data say against its numbers.
        max_steps: those that were planned.
        early_stop: why the training ended before them, of a run with early stopping, or of a trial that was pruned.
        pruned: the search ended this trial, because it was behind the others.
        best_step, model_step: the step of the best evaluation, and the one whose weights are in `model/`.
        decisions: of a recipe with `decisions`: `temperature` and `thresholds` by label as they were fitted on eval, `notes` why one was not,
            and what they change on `measured_on` (`afina.statistics.decision_rule.effects`); `cross_fitted`: without a test split.
        device, world_size, global_batch: of the last attempt.
        baselines: split -> simple models, the majority class first: name, rows that it was trained on, scores with limits, and the
            differences of this model from it (`afina.statistics.paired.Difference`) on `compared` rows; `left_out`: why there are none.
        parameters, trained_parameters: of the model; with an adapter fewer are trained.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    outcome: Literal["finished", "stopped", "failed"]
    exit_code: int
    attempt: str
    global_step: int = 0
    metrics: dict[str, Any] = {}
    samples_per_second: float | None = None
    utilisation: dict[str, Any] = {}
    seconds: float = 0.0
    attempts: int = 1
    failure: Failure | None = None
    cause: str | None = None
    warnings: list[str] = []
    max_steps: int | None = None
    early_stop: str | None = None
    pruned: bool = False
    best_step: int | None = None
    model_step: int | None = None
    task: str | None = None
    labels: list[str] | None = None
    baselines: dict[str, list[dict[str, Any]]] = {}
    decisions: dict[str, Any] = {}
    device: str | None = None
    world_size: int | None = None
    global_batch: int | None = None
    parameters: int | None = None
    trained_parameters: int | None = None

    @property
    def fails_again(self) -> bool:
        """True of a failure that another attempt would meet again, as long as nothing is changed."""
        causes, codes = (*ANOTHER_RUN, "disk", "claimed", "host-memory", "ulimit"), (EXIT_INPUT, EXIT_ENVIRONMENT)
        lasting = self.cause in causes or self.exit_code in codes
        return self.outcome == "failed" and self.cause != "node" and lasting

    @property
    def ended_early(self) -> str:
        """` of 100 (stopped early: no improvement …)`, to follow the number of steps; empty for other runs."""
        return f" of {self.max_steps:,} (stopped early: {self.early_stop})" if self.early_stop else ""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def error(self) -> str | None:
        return str(self.failure) if self.failure else None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Failure and cause from each other; a failure from the `error` of older files."""
        if not isinstance(values, dict):
            return values
        failure = values.get("failure")
        if failure is None and values.get("error"):
            code, cause = values.get("exit_code", 4), values.get("cause") or ""
            return {**values, "failure": Failure.of_exit_code(code, values["error"], cause=cause)}
        if failure is not None and not values.get("cause"):
            cause = failure.cause if isinstance(failure, Failure) else failure.get("cause")
            return {**values, "cause": cause or None}
        return values


def part_in_words(part: str) -> str:
    """A key of `utilisation["seconds_by_part"]` in words."""
    return "forward and backward" if part == "forward_backward" else part.replace("_", " ")


def data_warnings(prepared: Mapping[str, Any]) -> dict[str, list[str]]:
    """Warnings about the data that spoil the numbers of a split, by split: from the answer of the prepare stage."""
    spoiled = prepared.get("spoiled")
    if isinstance(spoiled, Mapping):
        return {str(split): [str(line) for line in lines] for split, lines in spoiled.items() if lines}
    shared: dict[str, list[str]] = {}
    for line in map(str, prepared.get("warnings") or []):
        if match := _SHARED.search(line):
            shared.setdefault(match[1], []).append(line)
    return shared
