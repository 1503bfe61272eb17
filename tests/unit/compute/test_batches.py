"""The rows of each step: exact cover, the same order in every batching, balance between ranks, resuming in the middle."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from tests.unit.compute.encoders import PAD, split_of
from torch.utils.data import DataLoader

from afina.run.plan import Geometry
from afina.worker.compute.batches import (
    Batching,
    Collator,
    EvalBatches,
    PackedCollator,
    Rows,
    StepBatches,
    balance,
    costs,
    epoch_steps,
)

GEOMETRIES = [(1, 1, 16), (1, 2, 8), (2, 1, 8), (4, 1, 4), (2, 4, 2), (16, 1, 1)]


def yelp_lengths(rows: int, seed: int) -> np.ndarray[Any, Any]:
    draw = np.random.default_rng(seed)
    return np.clip(draw.lognormal(np.log(130), 0.75, rows).astype(np.int64), 3, 512)


def geometry(processes: int, accumulation: int, batch: int) -> Geometry:
    return Geometry(
        nodes=1,
        processes_per_node=processes,
        gpus_per_node=0,
        cpus_per_process=1,
        global_batch=processes * accumulation * batch,
        batch_per_device=batch,
        accumulation=accumulation,
    )


def by_step(lengths: np.ndarray[Any, Any], layout: Geometry, batching: Batching, epoch: int) -> list[list[list[int]]]:
    """The micro-batches of every step: for each step a list over ranks and accumulation."""
    ranks = []
    for rank in range(layout.num_processes):
        batches = StepBatches(lengths, layout, rank, 3, batching)
        batches.set_epoch(epoch)
        ranks.append(list(batches))
        assert len(ranks[-1]) == len(batches)
    whole = len(lengths) // layout.global_batch
    cuts = [*range(0, whole * layout.accumulation + 1, layout.accumulation)]
    cuts += [len(ranks[0])] if len(ranks[0]) > cuts[-1] else []
    return [[micro for rank in ranks for micro in rank[a:b]] for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("rows", [160, 163, 171, 9])
@pytest.mark.parametrize("batching", ["packed", "grouped", "longest", "padded"])
def test_every_geometry_takes_the_same_rows_in_every_step(batching: Batching, rows: int) -> None:
    lengths = yelp_lengths(rows, rows)
    for epoch in (0, 1):
        expected = [sorted(s.tolist()) for s in epoch_steps(lengths, 16, 3, epoch, batching)]
        assert sorted(itertools.chain(*expected)) == list(range(rows))
        for shape in GEOMETRIES:
            layout = geometry(*shape)
            steps = by_step(lengths, layout, batching, epoch)
            labelled = [sorted(r for micro in step for r in micro if r >= 0) for step in steps]
            assert labelled == expected, shape
            assert all(1 <= len(m) <= layout.batch_per_device for step in steps for m in step), shape


def test_packed_steps_are_those_of_longest_and_of_padded() -> None:
    lengths = yelp_lengths(203, 1)
    packed, longest, padded = (epoch_steps(lengths, 8, 5, 2, b) for b in ("packed", "longest", "padded"))
    for a, b, c in zip(packed, longest, padded, strict=True):
        assert a.tolist() == b.tolist() == c.tolist()
    order = torch.randperm(203, generator=torch.Generator().manual_seed(7)).tolist()
    assert np.concatenate(packed).tolist() == order, "the order is that of accelerate's seedable sampler"


def test_packed_shares_come_longest_first() -> None:
    lengths = yelp_lengths(203, 2)
    for micro in itertools.chain(*by_step(lengths, geometry(2, 2, 4), "packed", 0)):
        each = [int(lengths[row if row >= 0 else ~row]) for row in micro]
        assert each == sorted(each, reverse=True)


@pytest.mark.parametrize(("processes", "accumulation", "batch"), [(2, 1, 8), (4, 1, 8), (2, 2, 8), (8, 1, 4)])
def test_work_is_balanced(processes: int, accumulation: int, batch: int) -> None:
    """All ranks wait for the one with most work: the costliest rank over the mean, full steps only."""
    lengths = yelp_lengths(4096, 9)
    price = costs(lengths, 384)

    def imbalance(batching: Batching) -> float:
        layout = geometry(processes, accumulation, batch)
        worst, mean = 0.0, 0.0
        for step in by_step(lengths, layout, batching, 0)[: 4096 // layout.global_batch]:
            loads = [
                sum(
                    float(price[row])
                    for micro in step[rank * accumulation : (rank + 1) * accumulation]
                    for row in micro
                )
                for rank in range(processes)
            ]
            worst, mean = worst + max(loads), mean + sum(loads) / processes
        return worst / mean

    before, after = imbalance("longest"), imbalance("packed")
    print(f"{processes} × {accumulation} × {batch}: imbalance {before:.3f} before, {after:.3f} after")
    assert after < 1 + (before - 1) / 2
    assert after < 1.12


def test_balance_is_deterministic_and_respects_the_limit() -> None:
    price = np.array([5.0, 5.0, 5.0, 1.0, 1.0, 9.0, 1.0, 5.0])
    parts = balance(price, 4, 2)
    assert parts == balance(price.copy(), 4, 2)
    assert sorted(itertools.chain(*parts)) == list(range(8))
    assert all(len(part) == 2 for part in parts)
    assert max(sum(price[part]) for part in parts) == 10.0
    assert balance(price[:2], 4, 2) == [[0], [1], [], []]


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_a_run_resumes_at_the_exact_batch(batching: Batching) -> None:
    """As Trainer resumes: set the epoch, skip batches."""
    split = split_of([1 + 7 * i % 60 for i in range(101)], 3)
    layout = geometry(2, 2, 4)
    for rank in (0, 1):
        sampler = StepBatches(split.lengths, layout, rank, 8, batching)
        sampler.set_epoch(1)
        loader = DataLoader(Rows(split), batch_sampler=sampler, collate_fn=list)
        expected = list(loader)
        again = StepBatches(split.lengths, layout, rank, 8, batching)
        resumed = skip_first_batches(DataLoader(Rows(split), batch_sampler=again, collate_fn=list), 6)
        again.set_epoch(1)
        assert list(resumed) == expected[6:]


@pytest.mark.parametrize("max_tokens", [None, 64, 1, 100_000])
def test_evaluation_batches_do_not_depend_on_the_number_of_ranks(max_tokens: int | None) -> None:
    lengths = yelp_lengths(101, 4) // 8 + 1
    whole = list(EvalBatches(lengths, 10, 0, 1, max_tokens))
    assert sorted(itertools.chain(*whole)) == list(range(101))
    assert [lengths[r] for b in whole for r in b] == sorted(lengths, reverse=True)
    if max_tokens is not None:
        assert all(len(b) == 1 or lengths[b].sum() <= max_tokens for b in whole)
        after = itertools.pairwise(whole)
        assert all(lengths[a].sum() + lengths[b[0]] > max_tokens for a, b in after), (
            "batches are as full as they can be"
        )
    for ranks in (2, 3, 7):
        parts = [EvalBatches(lengths, 10, rank, ranks, max_tokens) for rank in range(ranks)]
        assert {part.most for part in parts} == {-(-len(whole) // ranks)}
        merged = [b for turn in itertools.zip_longest(*parts) for b in turn if b is not None]
        assert merged == whole


def test_a_packed_batch_holds_the_tokens_of_the_padded_one() -> None:
    split = split_of([9, 8, 8, 3, 1], 7, types=True)
    rows = [0, 1, 2, ~3, 4]
    padded, packed = Collator(split, PAD)(rows), PackedCollator(split, PAD, 4)(rows)
    real = padded["attention_mask"].bool()
    for name in ("input_ids", "token_type_ids"):
        assert torch.equal(packed[name][0], padded[name][real]), name
    for one, other in zip(packed["labels"], padded["labels"], strict=True):
        assert torch.equal(one, other)
    assert packed["labels"][1].tolist() == [1, 1, 1, 0, 1], "a filler row has weight 0"
    assert packed["position_ids"][0].tolist() == [i for n in (9, 8, 8, 3, 1) for i in range(n)]
    assert packed["packing"].starts.tolist() == [0, 9, 17, 25, 28]


def test_positions_with_an_offset_equal_those_of_transformers() -> None:
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    split = split_of([9, 8, 8, 3, 1], 11, forbidden=None)
    split.tokens[[0, 4, 9, 28]] = PAD  # a text may say "<pad>", first of all
    rows = [0, 1, 2, 3, 4]
    padded = Collator(split, PAD)(rows)
    counted = RobertaEmbeddings.create_position_ids_from_input_ids(padded["input_ids"], PAD)
    found = PackedCollator(split, PAD, 4, offset=True)(rows)["position_ids"]
    assert torch.equal(found[0], counted[padded["attention_mask"].bool()])
