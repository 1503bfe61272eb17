"""Losses against PyTorch's own and against their formulas, per row, per step however it is divided, and per part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.compute.encoders import CONFIGS, PAD, model_of, split_of, without_dropout
from torch.nn import functional

from afina.errors import RecipeError
from afina.recipe.keys.train_keys import Train
from afina.run.plan import Geometry
from afina.schedule import Schedule
from afina.worker.compute import attention, packed_model
from afina.worker.compute.batches import Collator, PackedCollator, StepBatches, epoch_steps
from afina.worker.data.labels.loss_weights import label_weights
from afina.worker.data.prepared import Split
from afina.worker.task.losses import Loss
from afina.worker.training.evaluation import scores
from afina.worker.training.meter import Work

NAMES = ["a", "b", "c", "d", "e"]
#: The last step has one row: of two processes, one gets a filler row.
ROWS, BATCH = 41, 8

CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "plain": ("single-label", {}, False),
    "class weights": ("single-label", {"class_weights": {"a": 3, "b": 0.25, "d": 0}}, False),
    "balanced": ("single-label", {"class_weights": "balanced"}, False),
    "smoothed": ("single-label", {"label_smoothing": 0.2, "class_weights": {"e": 5}}, False),
    "sample weights": ("single-label", {}, True),
    "all": ("single-label", {"label_smoothing": 0.1, "class_weights": "balanced"}, True),
    "focal": ("single-label", {"loss": "focal", "class_weights": {"a": 2}}, True),
    "focal, small gamma": ("single-label", {"loss": "focal", "focal_gamma": 0.5}, False),
    "multi": ("multi-label", {}, False),
    "multi, positives": ("multi-label", {"pos_weight": {"a": 4, "b": 0.5}}, True),
    "multi, balanced": ("multi-label", {"pos_weight": "balanced", "label_smoothing": 0.1}, False),
    "multi, focal": ("multi-label", {"loss": "focal", "focal_gamma": 1.5, "pos_weight": {"a": 2}}, True),
    "regression": ("regression", {}, False),
    "regression, sample weights": ("regression", {}, True),
}


def _torch(
    train: Train, task: str, logits: torch.Tensor, labels: torch.Tensor, weights: Any, rows: Any
) -> torch.Tensor:
    """The mean loss of `rows` by PyTorch's functions; counts for `balanced` are those of all rows."""
    count = len(labels)
    x, y, s = (
        logits[rows].double(),
        labels[rows],
        torch.ones(len(rows)) if weights is None else torch.tensor(weights)[rows],
    )
    if task == "regression":
        return (s * functional.mse_loss(x[:, 0], y.double(), reduction="none")).sum() / s.sum()
    if task == "multi-label":
        positive = (labels > 0).sum(0)
        w = (count - positive) / positive if train.pos_weight == "balanced" else _given(train.pos_weight)
        y = y.double() * (1 - train.label_smoothing) + train.label_smoothing / 2
        each = functional.binary_cross_entropy_with_logits(x, y, reduction="none", pos_weight=w.double())
        if train.loss == "focal":
            right = torch.where(labels[rows] > 0, x.sigmoid(), 1 - x.sigmoid())
            each = each * (1 - right) ** (train.focal_gamma or 2.0)
        return (s * each.mean(-1)).sum() / s.sum()
    w = count / (5 * torch.bincount(labels)) if train.class_weights == "balanced" else _given(train.class_weights)
    if train.loss == "focal":
        p = x.softmax(-1)[torch.arange(len(y)), y]
        each = w[y] * (1 - p) ** (train.focal_gamma or 2.0) * -p.log()
        return (s * each).sum() / (s * w[y]).sum()
    smoothing = train.label_smoothing
    if weights is None:
        return functional.cross_entropy(x, y, w.double(), label_smoothing=smoothing)
    each = functional.cross_entropy(x, y, w.double(), label_smoothing=smoothing, reduction="none")
    return (s * each).sum() / (s * w[y]).sum()


def _given(weights: Any) -> torch.Tensor:
    return torch.tensor([(weights or {}).get(name, 1.0) for name in NAMES])


def _split(task: str, weighted: bool) -> Split:
    draw = np.random.default_rng(5)
    split = split_of([int(n) for n in draw.integers(2, 30, ROWS)], 4)
    labels = {
        "single-label": np.concatenate([np.arange(5), draw.integers(0, 5, ROWS - 5)]),
        "multi-label": np.concatenate([np.eye(5), draw.random((ROWS - 5, 5)) > 0.6]).astype(np.float32),
        # -100 is a value like any other.
        "regression": np.where(np.arange(ROWS) % 3 == 0, -100, draw.normal(size=ROWS)).astype(np.float32),
    }[task]
    weights = draw.choice([0, 0.5, 1, 3], ROWS).astype(np.float32) if weighted else None
    return Split(split.tokens, split.offsets, labels, None, weights)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_pytorchs_own_however_it_is_divided(name: str) -> None:
    """Loss and gradient of whole steps: packed and padded, one and two processes, accumulated; and the loss of a part."""
    task, keys, weighted = CASES[name]
    split, train = _split(task, weighted), Train.model_validate(keys)
    labels = torch.from_numpy(np.asarray(split.labels))
    loss = Loss.of(train, task, label_weights(train, task, NAMES, np.asarray(split.labels)))
    model = without_dropout(
        model_of(CONFIGS["roberta"], num_hidden_layers=1, num_labels=1 if task == "regression" else 5)
    ).train()
    padded, packed = Collator(split, PAD), PackedCollator(split, PAD, 4, offset=True)
    with torch.no_grad():
        inputs = padded(list(range(ROWS)))
        inputs.pop("labels")
        logits = model(**inputs)["logits"]
    packed_model.enable_packing(model, attention.PLAIN)
    head = [p for n, p in model.named_parameters() if n.startswith("classifier.out_proj")]
    work = Work(
        split.lengths,
        split.lengths,
        Schedule.of(ROWS, BATCH),
        2,
        "longest",
        loss.divisors(labels.numpy(), split.weights),
    )
    steps = epoch_steps(split.lengths, BATCH, 2, 0, "longest")
    chosen = [0, len(steps) - 1]
    wanted: dict[int, Any] = {}
    for processes, accumulation, batching in (
        (1, 1, "longest"),
        (1, 1, "packed"),
        (2, 1, "packed"),
        (1, 4, "packed"),
        (2, 2, "longest"),
    ):
        layout = Geometry(nodes=1, processes_per_node=processes, gpus_per_node=0, cpus_per_process=1, global_batch=BATCH,
                          batch_per_device=BATCH // processes // accumulation, accumulation=accumulation)  # fmt: skip
        ranks = [list(StepBatches(split.lengths, layout, rank, 2, batching)) for rank in range(processes)]  # type: ignore[arg-type]
        for number in chosen:
            model.zero_grad()
            first = number * accumulation
            last = len(ranks[0]) if number == len(steps) - 1 else first + accumulation
            total = torch.zeros(())
            for micro in (m for rank in ranks for m in rank[first:last]):
                batch = (packed if batching == "packed" else padded)(micro)
                targets, weights = batch.pop("labels")
                part = (loss(model(**batch)["logits"], targets) * weights).sum() / work.divisor(number + 1)
                part.backward()
                total = total + part.detach()
            gradient = torch.cat([p.grad.flatten() for p in head])
            if number not in wanted:
                wanted[number] = _torch(train, task, logits, labels, split.weights, steps[number]), gradient
            value, expected = wanted[number]
            assert float(total) == pytest.approx(float(value), rel=2e-6, abs=1e-7), (processes, accumulation, batching)
            assert float((gradient - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    found = scores(loss, [], logits.numpy(), replace(split, labels=labels.numpy()))["loss"]
    whole = _torch(train, task, logits, labels, split.weights, np.arange(ROWS))
    assert found == pytest.approx(float(whole), rel=1e-6)


@pytest.mark.parametrize("task", ["single-label", "multi-label"])
def test_focal_losses_have_finite_gradients_and_gamma_0_is_cross_entropy(task: str) -> None:
    logits = torch.tensor([[40.0, -40.0], [-40.0, 40.0], [0.0, 1.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1]) if task == "single-label" else torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for gamma in (0.0, 0.3, 1.0, 2.0, 5.0):
        loss = Loss.of(Train(loss="focal", focal_gamma=gamma), task, None)(logits, labels)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all(), gamma
        if gamma == 0:
            assert torch.allclose(loss, Loss(task)(logits, labels), rtol=1e-6)


def test_weights_of_labels_that_make_no_sense_are_refused() -> None:
    labels = np.array([0, 0, 1])
    assert label_weights(Train(), "single-label", ["a", "b"], labels) is None
    balanced = label_weights(Train(class_weights="balanced"), "single-label", ["a", "b"], labels)
    assert balanced is not None and balanced.tolist() == [0.75, 1.5], "as scikit-learn weighs them"
    flags = np.array([[1, 0], [1, 1], [0, 0]], np.float32)
    positive = label_weights(Train(pos_weight="balanced"), "multi-label", ["a", "b"], flags)
    assert positive is not None and positive.tolist() == [0.5, 2.0]
    for train, task, names, given, message in (
        (Train(class_weights={"aa": 2}), "single-label", ["a", "b"], labels, "'aa' is not a label"),
        (
            Train(class_weights="balanced"),
            "single-label",
            ["a", "b", "c"],
            labels,
            "no weight for 'c': train has no rows",
        ),
        (Train(class_weights={"a": 0, "b": 0}), "single-label", ["a", "b"], labels, "would have weight 0"),
        (Train(pos_weight="balanced"), "multi-label", ["a", "b"], flags * [1, 0], "no weight for 'b'"),
        (Train(pos_weight="balanced"), "multi-label", ["a", "b"], np.ones((3, 2)), "only rows with it"),
        (Train(class_weights="balanced"), "regression", None, labels, "does not fit a regression"),
        (Train(label_smoothing=0.1), "regression", None, labels, "does not fit a regression"),
        (Train(pos_weight="balanced"), "single-label", ["a", "b"], labels, "does not fit a single-label task"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            label_weights(train, task, names, given)
        assert caught.value.remedy
