"""Several classifiers as one: the mean of their probabilities, of regressions that of their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from afina.statistics.decision_rule import NO_RULE, logits_from, probabilities
from afina.worker.inference.classifier import Classifier, EncodedTexts

__all__ = ["ClassifierEnsemble", "EncodedForAll"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class EncodedForAll:
    """The tokens of N texts for each member.

    Attributes:
        each: of each member.
        rows: the numbers of the texts of which all members have tokens, ascending, int64 (M,).
        truncated: the most texts that a member cuts.
    """

    each: tuple[EncodedTexts, ...]
    rows: Array
    truncated: int

    @property
    def num_tokens(self) -> int:
        """Of all members together."""
        return sum(encoded.num_tokens for encoded in self.each)


class ClassifierEnsemble:
    """The members of an ensemble, in the place of one `Classifier`.

    Attributes:
        task, labels, num_labels, tokens, batching: of the first member; the others have the same labels in any order.
        rule: none: the members' temperatures are in their probabilities.
    """

    def __init__(self, members: Sequence[Classifier]) -> None:
        first = members[0]
        self.task, self.labels, self.num_labels = first.task, first.labels, first.num_labels
        self.tokens, self.batching, self.rule = first.tokens, first.batching, NO_RULE
        self._members = members
        self._orders = [[(member.labels or []).index(name) for name in self.labels or ()] for member in members]

    def encode(self, columns: Sequence[pa.Array], divided: Array | None = None) -> EncodedForAll:
        """As `Classifier.encode`."""
        each = tuple(member.encode(columns, divided) for member in self._members)
        rows = each[0].rows
        for encoded in each[1:]:
            rows = np.intersect1d(rows, encoded.rows)
        return EncodedForAll(each, rows, max(encoded.truncated for encoded in each))

    def run(self, encoded: EncodedForAll, advance: Callable[[int], None] = lambda rows: None) -> Array:
        """Logits of the mean probabilities, float32 (M, K), in the order of `encoded.rows`."""
        total: Array = np.zeros((len(encoded.rows), self.num_labels))
        for number, (member, part, order) in enumerate(zip(self._members, encoded.each, self._orders, strict=True)):
            logits = member.run(part, *([advance] if number == 0 else []))[np.isin(part.rows, encoded.rows)]
            values = probabilities(self.task, member.rule.scaled(logits.astype(np.float64)))
            total += values[:, order] if order else values
        mean: Array = logits_from(self.task, total / len(self._members)).astype(np.float32)
        return mean
