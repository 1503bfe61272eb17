"""A short training whose only product is what it cost: real model, real data, real Trainer, in a throw-away run directory.

One process does the share of one process of the real geometry. The first two steps take the longest batch of an epoch: one
makes what is made once, the other runs beside a save, which is when memory is at its highest. The next ones are timed; they
take batches of other sizes, so that the time of a step can be told from the tokens in it. Then comes an evaluation of the
longest texts.

Not seen: the exchange of gradients between processes, another machine than this one, batches of later epochs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, TrainerCallback

from afina.recipe.metrics import default_metrics, selection_metric
from afina.run.directory import RunDir
from afina.run.plan import Geometry
from afina.worker.compute import precision
from afina.worker.compute.batches import TOKENS_PER_ROW, EvalBatches, Rows, StepBatches, costs
from afina.worker.compute.cpu import processor
from afina.worker.data import prepared as store
from afina.worker.data.prepared import Split
from afina.worker.model.pretrained import verify_model
from afina.worker.survival.lease import Lease
from afina.worker.survival.stop import StopRequest
from afina.worker.training.build import build_arguments, build_model
from afina.worker.training.trainer import RunTrainer

__all__ = ["rehearse"]

#: Steps of an epoch that are looked at to find the longest and the mean one.
_LOOKED_AT = 4000
#: Steps that are not timed: the longest batch, twice.
_UNTIMED = 2
#: Where in the order of costs the timed steps lie.
_QUANTILES = (0.5, 0.85, 0.25, 0.95, 0.5, 0.7, 0.1, 0.4)
_ATTEMPT = "rehearsal"


def rehearse(run: RunDir, geometry: Geometry, steps: int, seconds: float, began: float) -> dict[str, Any]:
    """What it cost. Bytes, seconds, and costs in tokens (`afina.worker.compute.batches.costs`), as measured in this process.

    Args:
        run: claimed, with a plan for one process whose `max_steps` bounds the steps.
        geometry: the real one; its first process's batches are taken.
        steps, seconds: at least so many timed steps, and more for as long as they have taken less together.
        began: of this process, by `time.monotonic`.
    """
    plan, prepared = run.plan(), run.prepared()
    folder = Path(prepared["prepared"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base_bytes = _status("VmRSS")
    manifest = store.verify(folder)
    verify_model(prepared)
    task = manifest["task"]
    splits = {part: store.open_split(folder, part) for part in manifest["splits"]}
    best = selection_metric(task, plan.recipe.train.best_metric)
    choice = precision.choose_for_run(run, plan.recipe.train)
    arguments = build_arguments(plan, plan.geometry, run, best, task, choice)
    transformers.set_seed(plan.recipe.train.seed)
    model = build_model(plan, prepared["model_folder"], task, manifest["labels"], manifest["num_labels"])
    parameters = sum(p.numel() for p in model.parameters())
    run.begin_attempt(_ATTEMPT)
    lease = Lease(run, _ATTEMPT)
    lease.take()
    trainer = Rehearsal(
        real=geometry,
        run=run,
        attempt=_ATTEMPT,
        plan=plan,
        geometry=plan.geometry,
        task=task,
        labels=manifest["labels"],
        metric_names=list(dict.fromkeys([*default_metrics(task, plan.recipe.metrics), best])),
        pad_token_id=manifest["pad_token_id"],
        splits={
            "train": splits["train"],
            **({"eval": _longest_rows(splits["eval"], arguments)} if "eval" in splits else {}),
        },
        choice=choice,
        stop=StopRequest(run),
        lease=lease,
        model=model,
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )
    budget = Budget(trainer, steps, seconds)
    trainer.add_callback(budget)
    trainer.train()
    trainer.saver.finish()
    lease.release()
    saved = next((e for e in run.lines("events.jsonl") if e.get("event") == "checkpoint"), {})
    cuda = trainer.args.device.type == "cuda"
    took = list(trainer.times.last)[_UNTIMED:]
    return {
        "device": trainer.args.device.type,
        "device_name": torch.cuda.get_device_name() if cuda else processor().name,
        "threads": torch.get_num_threads(),
        "batching": trainer.batching,
        "parameters": parameters,
        "costs": [round(cost, 1) for cost in trainer.chosen_costs[_UNTIMED:][: len(took)]],
        "seconds": [round(s, 4) for s in took],
        "mean_cost": round(trainer.mean_cost, 1),
        "longest_tokens": trainer.longest_tokens,
        "train_rows": len(splits["train"]),
        "eval_cost": round(trainer.evaluation_cost(splits.get("eval")), 1),
        "test_cost": round(trainer.evaluation_cost(splits.get("test")), 1),
        "eval_seconds_per_cost": trainer.evaluation_pace,
        "save_seconds": saved.get("seconds"),
        "stall_seconds": saved.get("stall_s"),
        "checkpoint_bytes": saved.get("bytes"),
        "startup_seconds": round(budget.first - began, 3),
        "base_bytes": base_bytes,
        "peak_bytes": _status("VmHWM"),
        "gpu_peak_bytes": int(torch.cuda.max_memory_reserved()) if cuda else None,
        "gpu_total_bytes": int(torch.cuda.mem_get_info()[1]) if cuda else None,
    }


class Rehearsal(RunTrainer):
    """Trains on chosen steps of the real geometry's first epoch.

    Attributes:
        chosen_costs, mean_cost: of the chosen steps in their order, and of all that were looked at.
        longest_tokens: real tokens in the largest micro-batch.
        evaluation_pace: seconds of the evaluation by its cost; None before it.
    """

    def __init__(self, real: Geometry, **given: Any) -> None:
        self.real = real
        self.chosen_costs: list[float] = []
        self.mean_cost = 0.0
        self.longest_tokens = 0
        self.evaluation_pace: float | None = None
        super().__init__(**given)

    def get_train_dataloader(self) -> DataLoader[Any]:
        split, seed = self.splits["train"], self.plan.recipe.train.seed
        sampler = Chosen(split.lengths, self.real, 0, seed, self.batching, self._hidden)
        steps = sampler.first_steps()
        each = [sum(self._cost(split, micro) for micro in step) for step in steps]
        largest = [max(self._cost(split, micro) for micro in step) for step in steps]
        longest = max(range(len(steps)), key=largest.__getitem__)
        order = sorted(range(len(steps)), key=each.__getitem__)
        most = self.plan.recipe.train.max_steps or 0
        quantiles = itertools.islice(itertools.cycle(_QUANTILES), most - _UNTIMED)
        chosen = [*[longest] * _UNTIMED, *(order[round(q * (len(order) - 1))] for q in quantiles)]
        sampler.micros = [micro for number in chosen for micro in steps[number]]
        self.chosen_costs, self.mean_cost = [each[number] for number in chosen], float(np.mean(each))
        self.longest_tokens = max(int(split.lengths[_real(micro)].sum()) for micro in steps[longest])
        return DataLoader(Rows(split), batch_sampler=sampler, collate_fn=self._collator(split))

    def evaluation_loop(self, dataloader: DataLoader[Any], *given: Any, **named: Any) -> Any:
        began = time.monotonic()
        output = super().evaluation_loop(dataloader, *given, **named)
        self.evaluation_pace = (time.monotonic() - began) / self.evaluation_cost(self.splits["eval"])
        return output

    def evaluation_cost(self, split: Split | None) -> float:
        """What evaluating `split` costs, forward only: in the unit of a step's cost, though a step does three times as much."""
        if split is None:
            return 0.0
        size = self.args.per_device_eval_batch_size
        max_tokens = size * TOKENS_PER_ROW if self.batching == "packed" else None
        return sum(self._cost(split, rows) for rows in EvalBatches(split.lengths, size, 0, 1, max_tokens).batches)

    @property
    def _hidden(self) -> int:
        return int(getattr(self.model.config, "hidden_size", 768))

    def _cost(self, split: Split, rows: list[int]) -> float:
        """Of a batch as it is computed: padding counts where there is any."""
        lengths = split.lengths[_real(rows)]
        if self.batching == "padded":
            lengths = np.full(len(rows), self.plan.recipe.tokens.max_length)
        elif self.batching != "packed":
            lengths = np.full(len(rows), lengths.max())
        return float(costs(lengths, self._hidden).sum())


class Chosen(StepBatches):
    """Some steps of an epoch, each with all its micro-batches: `micros`, which is set before it is read."""

    micros: list[list[int]]

    def first_steps(self) -> list[list[list[int]]]:
        """The micro-batches of the epoch's first whole steps; of its short one only where there is no other."""
        micros = super().__iter__()
        whole = len(self.lengths) // self.geometry.global_batch
        if not whole:
            return [list(micros)]
        return [list(itertools.islice(micros, self.geometry.accumulation)) for _ in range(min(whole, _LOOKED_AT))]

    def __len__(self) -> int:
        return len(self.micros)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.micros)


class Budget(TrainerCallback):  # type: ignore[misc]
    """Saves after the first step, and ends the training when the time is up; the last step has the evaluation.

    Attributes:
        first: when the first step began, by `time.monotonic`.
    """

    def __init__(self, trainer: RunTrainer, steps: int, seconds: float) -> None:
        self.trainer, self.steps, self.seconds = trainer, steps, seconds
        self.first = self.timed = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.first = time.monotonic()
        elif state.global_step == _UNTIMED:
            self.trainer.saver.finish()
            self.timed = time.monotonic()
        # The step that begins is the last one, where enough were timed before it.
        if state.global_step >= _UNTIMED + self.steps - 1 and time.monotonic() - self.timed > self.seconds:
            state.max_steps = state.global_step + 1
            self.trainer.schedule = replace(self.trainer.schedule, total_steps=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == 1


def _real(rows: list[int]) -> list[int]:
    """Rows without the mark of those that carry no loss."""
    return [row if row >= 0 else ~row for row in rows]


def _longest_rows(split: Split, arguments: Any) -> Split:
    """The longest texts, enough for an evaluation's first batch, and some of middling length; as a split of its own."""
    size = arguments.per_device_eval_batch_size
    order = np.argsort(-split.lengths, kind="stable")
    # A packed batch of short texts holds more rows than `size`.
    ends = np.cumsum(split.lengths[order])
    first = max(size, int(np.searchsorted(ends, size * TOKENS_PER_ROW, side="right")))
    middle = len(order) // 2
    rows = np.unique(np.concatenate([order[:first], order[middle : middle + 2 * size]]))
    spans = [slice(int(split.offsets[row]), int(split.offsets[row + 1])) for row in rows]
    return Split(
        np.concatenate([split.tokens[span] for span in spans]),
        np.concatenate([[0], np.cumsum([span.stop - span.start for span in spans])]).astype(np.int64),
        np.asarray(split.labels)[rows],
        None if split.types is None else np.concatenate([split.types[span] for span in spans]),
    )


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, or VmHWM, the highest it was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
