"""Rehearsal: a short training that measures what a run costs, with the real model and data in a temporary run directory.

One process does the work of one process of the real geometry. The first two steps take the longest batch of an epoch: the
first one includes what happens only once, the second one runs during a save, when memory use is highest. The next steps are
timed; their batches differ in size, so that the time of a step can be related to its tokens. The last step is followed by an
evaluation of the longest texts.

Not covered: the exchange of gradients between processes, other machines, batches of later epochs.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from afina.run.allocation import Allocation
from afina.run.directory import RunDir
from afina.run.plan import Geometry
from afina.worker.compute.batches import TOKENS_PER_ROW, StepBatches, costs, row_numbers
from afina.worker.compute.cpu import processor, resident_bytes
from afina.worker.data.prepared import Split
from afina.worker.survival.lease import Lease
from afina.worker.survival.stop import StopRequest
from afina.worker.training.attempt import Attempt, open_data
from afina.worker.training.build import build_attempt, eval_batch_size, eval_batches, train_loader
from afina.worker.training.evaluation import logits_of
from afina.worker.training.trainer import RunTrainer

__all__ = ["rehearse"]

#: Steps of an epoch among which the longest and the mean one are sought.
_CONSIDERED = 4000
#: Steps that are not timed: the longest batch, twice.
_UNTIMED = 2
#: Quantiles of cost of the timed steps.
_QUANTILES = (0.5, 0.85, 0.25, 0.95, 0.5, 0.7, 0.1, 0.4)


def rehearse(run: RunDir, geometry: Geometry, steps: int, seconds: float, began: float) -> dict[str, Any]:
    """Measure the costs of a run: bytes, seconds, and costs in tokens (`compute.batches.costs`).

    Args:
        run: claimed, with a plan for one process; its `max_steps` limits the steps.
        geometry: the real one; the batches are those of its first process.
        steps, seconds: time at least so many steps, and more until they have taken so long.
        began: start of this process, by `time.monotonic`.
    """
    plan = run.plan()
    base_bytes = resident_bytes()
    data = open_data(plan, run.prepared(), verify=True)
    splits = data.splits
    if "eval" in splits:
        longest = _longest_rows(splits["eval"], eval_batch_size(plan, plan.geometry))
        data = dataclasses.replace(data, splits={"train": splits["train"], "eval": longest})
    else:
        data = dataclasses.replace(data, splits={"train": splits["train"]})
    allocation = Allocation(attempt="rehearsal")
    run.begin_attempt(allocation.attempt)
    lease = Lease(run, allocation.attempt)
    lease.take()
    attempt, model, arguments = build_attempt(run, allocation, plan.geometry, data, StopRequest(run), lease)
    trainer = Rehearsal(geometry, attempt, model, arguments)
    budget = _Budget(attempt, steps, seconds)
    trainer.add_callback(budget)
    trainer.train()
    attempt.saver.finish()
    lease.release()
    timed = list(attempt.times.last)[_UNTIMED:]
    return {
        "batching": attempt.batching,
        "parameters": attempt.parameters[1],
        "costs": [round(cost, 1) for cost in trainer.chosen_costs[_UNTIMED:][: len(timed)]],
        "seconds": [round(s, 4) for s in timed],
        "mean_cost": round(trainer.mean_cost, 1),
        "longest_tokens": trainer.longest_tokens,
        "train_rows": len(splits["train"]),
        "eval_cost": round(trainer.evaluation_cost(splits.get("eval")), 1),
        "test_cost": round(trainer.evaluation_cost(splits.get("test")), 1),
        "eval_seconds_per_cost": trainer.evaluation_seconds_per_cost,
        **_of_save(run),
        "startup_seconds": round(budget.first - began, 3),
        "base_bytes": base_bytes,
        **_of_machine(attempt.device),
    }


def _of_save(run: RunDir) -> dict[str, Any]:
    event = next((e for e in run.lines("events.jsonl") if e.get("event") == "checkpoint"), {})
    return {
        "save_seconds": event.get("seconds"),
        "stall_seconds": event.get("stall_s"),
        "checkpoint_bytes": event.get("bytes"),
    }


def _of_machine(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if cuda else processor().name,
        "threads": torch.get_num_threads(),
        "peak_bytes": resident_bytes(most=True),
        "gpu_peak_bytes": int(torch.cuda.max_memory_reserved()) if cuda else None,
        "gpu_total_bytes": int(torch.cuda.mem_get_info()[1]) if cuda else None,
    }


class Rehearsal(RunTrainer):
    """Trains on chosen steps of the real geometry's first epoch.

    Attributes:
        chosen_costs, mean_cost: of the chosen steps in their order, and of all steps considered.
        longest_tokens: real tokens in the largest micro-batch.
        evaluation_seconds_per_cost: of the evaluation; None before it.
    """

    def __init__(self, real: Geometry, attempt: Attempt, model: Any, arguments: TrainingArguments) -> None:
        self.real = real
        self.chosen_costs: list[float] = []
        self.mean_cost = 0.0
        self.longest_tokens = 0
        self.evaluation_seconds_per_cost: float | None = None
        super().__init__(attempt, model, arguments)

    def get_train_dataloader(self) -> DataLoader[Any]:
        attempt, split, train = self.attempt, self.attempt.data.splits["train"], self.attempt.plan.recipe.train
        each = split.sum_over_sequences(lambda lengths: costs(lengths, self._hidden))
        batches = _ChosenSteps(split.lengths, self.real, 0, train.seed, attempt.batching, each=each)
        steps = batches.first_steps()
        of_steps = [sum(self._cost(split, micro) for micro in step) for step in steps]
        largest = [max(self._cost(split, micro) for micro in step) for step in steps]
        longest = max(range(len(steps)), key=largest.__getitem__)
        order = sorted(range(len(steps)), key=of_steps.__getitem__)
        quantiles = itertools.islice(itertools.cycle(_QUANTILES), (train.max_steps or 0) - _UNTIMED)
        chosen = [*[longest] * _UNTIMED, *(order[round(q * (len(order) - 1))] for q in quantiles)]
        batches.micros = [micro for number in chosen for micro in steps[number]]
        self.chosen_costs, self.mean_cost = [of_steps[number] for number in chosen], float(np.mean(of_steps))
        self.longest_tokens = max(int(split.lengths[row_numbers(micro)].sum()) for micro in steps[longest])
        return train_loader(attempt, self.model, batches=batches)

    def evaluation_loop(self, dataloader: DataLoader[Any], *given: Any, **named: Any) -> Any:
        output = super().evaluation_loop(dataloader, *given, **named)
        # Once more: the first time includes what happens only once, and imports of the metrics.
        began = time.monotonic()
        logits_of(self.attempt, dataloader, self._forward, may_stop=False)
        cost = self.evaluation_cost(self.attempt.data.splits["eval"])
        self.evaluation_seconds_per_cost = (time.monotonic() - began) / cost
        return output

    def evaluation_cost(self, split: Split | None) -> float:
        """The cost of evaluating `split`, forward only: in the unit of a step's cost, though a step does three times as much."""
        if split is None:
            return 0.0
        batches = eval_batches(self.attempt, split, self.args.per_device_eval_batch_size).batches
        return sum(self._cost(split, rows) for rows in batches)

    @property
    def _hidden(self) -> int:
        return int(getattr(self.model.config, "hidden_size", 768))

    def _cost(self, split: Split, rows: list[int]) -> float:
        """The cost of a batch as it is computed, with its padding."""
        starts, ends, _ = split.spans(row_numbers(rows))
        lengths, batching = ends - starts, self.attempt.batching
        if batching == "padded":
            lengths = np.full(len(lengths), self.attempt.plan.recipe.tokens.max_length)
        elif batching != "packed":
            lengths = np.full(len(lengths), lengths.max())
        return float(costs(lengths, self._hidden).sum())


class _ChosenSteps(StepBatches):
    """Some steps of an epoch, each with all its micro-batches: `micros`, which is set before the first iteration."""

    micros: list[list[int]]

    def first_steps(self) -> list[list[list[int]]]:
        """The micro-batches of the epoch's first whole steps; of its short step only if there is no other."""
        micros = super().__iter__()
        whole = len(self.lengths) // self.geometry.global_batch
        if not whole:
            return [list(micros)]
        return [list(itertools.islice(micros, self.geometry.accumulation)) for _ in range(min(whole, _CONSIDERED))]

    def __len__(self) -> int:
        return len(self.micros)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.micros)


class _Budget(TrainerCallback):  # type: ignore[misc]
    """Saves after the first step, and ends the training when the time is up; the last step includes the evaluation.

    Attributes:
        first: when the first step began, by `time.monotonic`.
    """

    def __init__(self, attempt: Attempt, steps: int, seconds: float) -> None:
        self.attempt, self.steps, self.seconds = attempt, steps, seconds
        self.first = self.timed = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.first = time.monotonic()
        elif state.global_step == _UNTIMED:
            self.attempt.saver.finish()
            self.timed = time.monotonic()
        # The step that begins is the last one if enough were timed before it.
        if state.global_step >= _UNTIMED + self.steps - 1 and time.monotonic() - self.timed > self.seconds:
            state.max_steps = state.global_step + 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == 1


def _longest_rows(split: Split, size: int) -> Split:
    """A split of the longest texts, enough for the first batch of an evaluation, and of some of medium length.

    Args:
        size: rows of a batch of an evaluation.
    """
    order = np.argsort(-split.lengths, kind="stable")
    # A packed batch of short texts holds more rows than `size`.
    ends = np.cumsum(split.lengths[order])
    first = max(size, int(np.searchsorted(ends, size * TOKENS_PER_ROW, side="right")))
    middle = len(order) // 2
    rows = np.unique(np.concatenate([order[:first], order[middle : middle + 2 * size]]))
    return split.take(rows)
