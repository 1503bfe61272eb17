"""Rows whose label is probably wrong, from probabilities out of fold: confident learning (Northcutt, Jiang and Chuang 2021, JAIR 70).

As cleanlab 2.9 computes it (`filter_by="confident_learning"`), which needs pandas and scikit-learn, and which the host does without. A label's threshold is
its mean probability among the rows that have it. A row is an issue where the label that passes its own threshold, or of several such the most probable of
all, is not the given one, and the model does not predict the given one. Issues come first; rows are ranked by the probability of the given label
(`self_confidence`). Several labels: each is a question of its own, and the least probable answer of a row counts. Not covered: regression.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from afina.statistics.predictions import Predictions

__all__ = ["doubtful_rows", "label_quality"]

Array = Any

#: The most doubtful rows that are listed even where confident learning names fewer issues.
_LEAST = 100


def doubtful_rows(out_of_fold: Predictions) -> list[dict[str, str]]:
    """The issues of a cross-validation, at least `_LEAST` rows, the most doubtful first; none of a regression or of entities.

    Keys: rank, what identifies the row, its text, `label`, `suggested` (of several labels: `NAME?`, the one that is probably wrong), the `probability` of
    the label, a mean over repeats, and `issue` (yes, or nothing).

    Args:
        out_of_fold: sorted by repeat, with the same rows in the same order in each.
    """
    import numpy as np

    if out_of_fold.scores is None:
        return []
    repeats = len(out_of_fold.table.column("repeat").unique())
    count = len(out_of_fold) // repeats
    scores = out_of_fold.scores.reshape(repeats, count, -1).mean(0)
    first = replace(
        out_of_fold, truth=out_of_fold.truth[:count], scores=scores, table=out_of_fold.table.slice(0, count)
    )
    quality, issue, other = label_quality(first)
    order = np.lexsort((np.arange(count), quality, ~issue))[: max(_LEAST, int(issue.sum()))]
    return [
        {
            "rank": str(rank),
            **{name: "" if value is None else str(value) for name, value in first.about(int(i)).items()},
            "label": _named(first, int(i)),
            "suggested": first.labels[other[i]] + ("?" if first.task == "multi-label" else ""),
            "probability": f"{quality[i]:.4f}",
            "issue": "yes" if issue[i] else "",
        }
        for rank, i in enumerate(order, start=1)
    ]


def _named(rows: Predictions, index: int) -> str:
    label = rows.table.column("label")[index].as_py()
    return ", ".join(label) if isinstance(label, list) else str(label)


def label_quality(predictions: Predictions) -> tuple[Array, Array, Array]:
    """Of each row the probability of its label, float64 (N,); whether the label is an issue, bool (N,); and the label that is more probable: its
    index, int64 (N,), of several labels the one that is probably wrong.

    Args:
        predictions: of models that were not trained on these rows; no regression.
    """
    import numpy as np

    truth, scores = predictions.truth, predictions.scores
    assert scores is not None
    if predictions.task == "multi-label":
        given = np.where(truth, scores, 1 - scores)
        means = np.array([[_mean(1 - s, ~t), _mean(s, t)] for s, t in zip(scores.T, truth.T, strict=True)])
        issue = 1 - given >= np.where(truth, means[:, 0], means[:, 1])
        issue &= given < 0.5
        return given.min(1), issue.any(1), given.argmin(1)
    rows = np.arange(len(truth))
    thresholds = np.array([_mean(scores[:, k], truth == k) for k in range(scores.shape[1])])
    passes = scores >= thresholds - 1e-6
    guess = np.where(passes.sum(1) > 1, scores.argmax(1), passes.argmax(1))
    issue = passes.any(1) & (guess != truth)
    others = scores.copy()
    others[rows, truth] = -1
    issue &= scores[rows, truth] + 1e-8 <= others.max(1)
    return scores[rows, truth], issue, others.argmax(1)


def _mean(values: Array, chosen: Array) -> float:
    """Of the chosen values; above 1 where there are none, which no probability reaches."""
    return float(values[chosen].mean()) if chosen.any() else 2.0
