"""The groups of a packed batch: the cheapest split of all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from afina.worker.compute.packing import filled_width, group_sequences


@pytest.mark.parametrize("seed", range(5))
def test_the_groups_are_the_cheapest_split(seed: int) -> None:
    draw = random.Random(seed)
    lengths = sorted((draw.randint(1, 60) for _ in range(9)), reverse=True)
    call = draw.choice([0.0, 50.0, 500.0, 1e9])

    def price(sizes: Sequence[int]) -> float:
        ends = list(itertools.accumulate(sizes, initial=0))
        return sum(call + n * lengths[first] ** 2 for first, n in zip(ends, sizes, strict=False))

    ways = [
        [b - a for a, b in itertools.pairwise((0, *bars, len(lengths)))]
        for count in range(len(lengths))
        for bars in itertools.combinations(range(1, len(lengths)), count)
    ]
    assert price(group_sequences(lengths, call)) == pytest.approx(min(map(price, ways))), (seed, lengths, call)


def test_few_widths_recur_and_little_is_added() -> None:
    added = {tokens: filled_width(tokens) - tokens for tokens in range(1, 5000)}
    assert all(0 <= more <= max(15, tokens / 32) for tokens, more in added.items())
    assert [len({filled_width(n) for n in range(low, 2 * low)}) for low in (128, 512, 2048)] == [9, 33, 33]
    assert all(filled_width(filled_width(tokens)) == filled_width(tokens) for tokens in added)
