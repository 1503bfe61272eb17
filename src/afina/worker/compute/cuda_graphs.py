"""Training steps as CUDA graphs: recorded once for each width of a packed batch, then replayed.

A fast GPU computes a step of a few short texts in less time than Python takes to launch its thousand kernels; a recorded step is
one launch. A graph has fixed shapes, so a batch is padded to one of a few widths by one more sequence, which has weight 0 in the loss.
Forward and backward are recorded, with gradients at fixed addresses; clipping and the optimizer stay as they are. Dropout draws new
masks at each replay: a graph reads torch's generator and advances it.

Whether a batch is replayed depends on the batch alone, not on earlier recordings, so that a resumed run draws what the
uninterrupted run drew. Recording draws nothing. A trial run comes first, where a failure is harmless: after a failed recording torch
cannot draw random numbers any more (its generator stays in the recording, torch 2.13).

Covered: one process, bfloat16, flash attention (`afina.worker.compute.flash`), the architectures in `_SUPPORTED`. Not covered:
several processes, float16 (whose loss is scaled), evaluation.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from afina.errors import TrainingError
from afina.worker.compute import flash
from afina.worker.compute.batches import Targets
from afina.worker.compute.packing import Packing
from afina.worker.model.weights import is_token_classifier

__all__ = ["GraphedStep", "why_not_graphed", "padded_width"]

#: Encoders whose packed forward pass neither waits for the GPU nor takes a shape from the host, by `model_type`.
_SUPPORTED = ("bert", "electra", "roberta", "xlm-roberta", "camembert", "distilbert")

#: The most tokens of padding.
_UNIT = 512

#: Wider batches keep a GPU busy without graphs, and a recording would keep their activations.
_WIDEST = 16_384

#: (batch, number of items) -> loss; adds to the gradients.
Step = Callable[[dict[str, Any], torch.Tensor], torch.Tensor]


def padded_width(tokens: int) -> int:
    """The width that a batch of `tokens` is padded to: more than `tokens`, by at most 256 or an eighth."""
    unit = min(_UNIT, max(256, (1 << tokens.bit_length() - 1) // 8))
    return -(-(tokens + 1) // unit) * unit


def why_not_graphed(model: Any, batching: str, processes: int, *, bf16: bool, checkpointing: bool) -> str | None:
    """The reason why steps of `model` cannot be CUDA graphs; None where they can.

    Args:
        bf16: steps are computed in bfloat16.
        checkpointing: the backward pass recomputes layers.
    """
    config, device = model.config, next(model.parameters()).get_device()
    if device < 0:
        return "no GPU"
    if processes > 1:
        return "several processes"
    if batching != "packed":
        return f"batches are {batching}, not packed"
    if not bf16:
        return "not in bfloat16"
    if checkpointing:
        return "activation checkpointing"
    if is_token_classifier(model):
        return "labels of words have no fixed number"
    if config.model_type not in _SUPPORTED:
        return f"not tried for {config.model_type}"
    if not flash.available(device, config.hidden_size // config.num_attention_heads):
        return "no flash attention"
    return None


class GraphedStep:
    """A training step on packed batches of one GPU, replayed as a CUDA graph.

    Args:
        step: the step, computed kernel by kernel.
        rows: examples of the batches that are recorded; `step` computes others.
        longest: the most tokens of an example.

    Attributes:
        padding_tokens: number of padding tokens so far.
        seconds: of each recording, by width.
        fallback_reason: why all batches are computed by `step`; empty: graphs are used.
    """

    def __init__(self, step: Step, model: torch.nn.Module, rows: int, longest: int) -> None:
        self.step, self.model, self.rows, self.longest = step, model, rows, longest
        self.padding_tokens = 0
        self.seconds: dict[int, float] = {}
        self.fallback_reason = ""
        self._slots: dict[int, _StaticBatch] = {}
        self._gradients: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        """The loss of a batch on the GPU; adds its gradients to the parameters'."""
        tokens = batch["input_ids"].shape[1]
        width = padded_width(tokens)
        if self.fallback_reason or width > _WIDEST or len(batch["packing"].lengths) != self.rows:
            return self.step(batch, items)
        slot = self._slots.get(width)
        if slot is None:
            began = time.perf_counter()
            slot = _StaticBatch(batch, items, width, max(self.longest, _UNIT))
            if not self._record(slot):
                return self.step(batch, items)
            self._slots[width] = slot
            self.seconds[width] = time.perf_counter() - began
        slot.fill(batch, items)
        self._bind_gradients()
        assert slot.graph is not None and slot.loss is not None
        slot.graph.replay()
        self.padding_tokens += width - tokens
        return slot.loss.clone()

    def _record(self, slot: _StaticBatch) -> bool:
        """Record the step; False if the trial fails.

        Raises:
            TrainingError: the trial succeeded and the recording failed.
        """
        before = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        random = torch.cuda.get_rng_state()
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        if not self._gradients:
            self._gradients = self._try(slot)
        if not self.fallback_reason:
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
            slot.graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may copy checkpoints meanwhile.
                with torch.cuda.graph(slot.graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    slot.loss = self.step(slot.batch(), slot.items)
            except RuntimeError as error:
                raise TrainingError(
                    f"train.cuda_graphs: a step of {slot.width} tokens could not be recorded: {error}",
                    "set train.cuda_graphs: false, or a smaller train.max_batch_per_device if memory ran out",
                ) from error
            self._pool = self._pool or slot.graph.pool()
        for parameter, kept in before:
            parameter.grad = kept
        torch.cuda.set_rng_state(random)
        return not self.fallback_reason

    def _try(self, slot: _StaticBatch) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """A trial step on the stream of the recordings, in which nothing may wait for the GPU; it also initialises libraries.

        Returns: the parameters that got a gradient, each with a buffer for it.
        """
        assert self._stream is not None
        for parameter in self.model.parameters():
            parameter.grad = None
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                # Warnings of gradients from another stream, and of the next line, which is a prototype.
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")
                self.step(slot.batch(), slot.items)
        except RuntimeError as error:
            self.fallback_reason = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(self._stream)
        used = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        return [(parameter, torch.zeros_like(parameter)) for parameter in used]

    def _bind_gradients(self) -> None:
        """Make the recordings' buffers the gradients: 0 at the start of a step, else with the gradients so far."""
        fresh = [gradient for parameter, gradient in self._gradients if parameter.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for parameter, gradient in self._gradients:
            if parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient


class _StaticBatch:
    """The inputs of one recording, at fixed addresses."""

    def __init__(self, batch: dict[str, Any], items: torch.Tensor, width: int, longest: int) -> None:
        packing: Packing = batch["packing"]
        self.width = width
        rows, device = len(packing.lengths), batch["input_ids"].device
        self.tokens = {
            name: torch.zeros(1, width, dtype=value.dtype, device=device)
            for name, value in batch.items()
            if name not in ("packing", "labels")
        }
        labels, weights = batch["labels"]
        self.targets: Targets = (
            torch.zeros(rows + 1, *labels.shape[1:], dtype=labels.dtype, device=device),
            torch.zeros(rows + 1, dtype=weights.dtype, device=device),
        )
        self.items = torch.empty_like(items)
        starts, bounds = (
            torch.full((rows + n,), width, dtype=x.dtype, device=device)
            for n, x in ((1, packing.starts), (2, packing.bounds))
        )
        self.packing = Packing((longest,) * (rows + 1), starts, bounds, ())
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss: torch.Tensor | None = None
        self.fill(batch, items)

    def fill(self, batch: dict[str, Any], items: torch.Tensor) -> None:
        """Copy a batch of `rows` sequences and pad it with one more. Zeros are valid tokens and positions in all architectures."""
        packing: Packing = batch["packing"]
        rows, end = len(packing.lengths), batch["input_ids"].shape[1]
        for name, value in self.tokens.items():
            value[:, :end].copy_(batch[name])
            value[:, end:].zero_()
        for kept, value in zip(self.targets, batch["labels"], strict=True):
            kept[:rows].copy_(value)
        self.items.copy_(items)
        self.packing.starts[:rows].copy_(packing.starts)
        self.packing.starts[rows:].fill_(end)
        self.packing.bounds[: rows + 1].copy_(packing.bounds)

    def batch(self) -> dict[str, Any]:
        """The batch as a collator returns it; a new dictionary each time, because a step pops its labels."""
        return {**self.tokens, "labels": self.targets, "packing": self.packing}
