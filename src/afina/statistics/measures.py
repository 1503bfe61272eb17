"""The built-in metrics, in NumPy: evaluation, reports, sweeps and `compare` compute them here, and so by one rule.

A metric of decisions is a function of sums over rows (`sums_of`, `from_sums`), so that a bootstrap needs only the sums. The values
are scikit-learn's and SciPy's (tested against them). One rule for classes: macro averages go over the classes that occur in the labels or
the predictions; in them a class that is never predicted has precision 0, and one without rows recall 0. `balanced_accuracy`, `auroc` and
`average_precision` go over the classes that occur in the labels. What is not defined is NaN, with a reason from `compute`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = [
    "ROW_SHARES",
    "average_precision",
    "auroc",
    "compute",
    "contributions",
    "from_sums",
    "one_vs_rest",
    "parts",
    "per_class",
    "ranks",
    "row_losses",
    "sums_of",
    "threshold_curves",
]

Array = Any

#: Metrics that are the share of rows that are right, by task.
ROW_SHARES = {
    "single-label": ("accuracy", "f1_micro", "precision_micro", "recall_micro", "recall_weighted"),
    "multi-label": ("subset_accuracy",),
}

#: Why a metric has no value.
_REASONS = {
    "pearson": "the labels or the predictions are all the same, or there are fewer than two rows",
    "spearman": "the labels or the predictions are all the same, or there are fewer than two rows",
    "r2": "the labels are all the same, or there are fewer than two rows",
    "auroc": "no class has rows both with and without it",
    "average_precision": "no class occurs in the labels",
    "kappa": "labels and predictions are all of one class",
    "kappa_quadratic": "labels and predictions are all of one class",
}


def compute(
    task: str, names: Sequence[str], truth: Array, predicted: Array, scores: Array | None, width: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """The named metrics, and why those that are None have no value.

    Args:
        truth, predicted: class ids (N,), flags (N, L), values (N,), or of a token classification what
            `afina.statistics.entities.count_rows` returns, (N, 2 L).
        scores: probabilities (N, L) of a classifier, for the metrics that need them.

    Returns: name -> value; `precision`, `recall` and `f1` bring `*_per_class` lists along.
    """
    import numpy as np

    if not len(truth):
        return dict.fromkeys(names), dict.fromkeys(names, "there are no rows")
    sums = sums_of(task, width, truth, predicted)[None, :]
    known: dict[str, Any] = {name: float(value[0]) for name, value in from_sums(task, sums).items()}
    if task == "regression" and "spearman" in names:
        known["spearman"] = _correlation(ranks(truth), ranks(predicted))
    if task != "regression":
        for name, row in per_class(task, sums[0]).items():
            known[f"{name}_per_class"] = [None if np.isnan(v) else float(v) for v in row]
    if "confusion_matrix" in names:
        pairs = np.asarray(truth, np.int64) * width + np.asarray(predicted, np.int64)
        known["confusion_matrix"] = np.bincount(pairs, minlength=width * width).reshape(width, width).tolist()
    if scores is not None:
        if wanted := {"log_loss", "brier"} & set(names):
            losses = row_losses(task, truth, scores)
            known |= {name: float(losses[name].mean()) for name in wanted}
        for name, function in (("auroc", auroc), ("average_precision", average_precision)):
            if name in names:
                each = [function(flags, column) for flags, column in one_vs_rest(task, truth, scores)]
                each = [value for value in each if value == value]
                known[name] = float(np.mean(each)) if each else float("nan")
    values: dict[str, Any] = {}
    for name in names:
        values |= {key: known[key] for key in (name, f"{name}_per_class") if key in known}
    lost = {name: _REASONS.get(name, "it is not a number") for name, value in values.items() if value != value}
    return {name: None if name in lost else value for name, value in values.items()}, lost


def contributions(task: str, width: int, truth: Array, predicted: Array) -> Array:
    """Contribution of each row to the sums, float64 (N, D).

    D is 3 L + 3 for classifiers of texts and words (correct, predicted and true of each label; all labels correct; the squared distance of the classes;
    1) and 8 for regression.
    """
    import numpy as np

    one = np.ones((len(truth), 1))
    if task == "regression":
        middle = np.mean(truth) if len(truth) else 0.0  # the square of a large mean would swallow the variance
        truth, predicted = np.asarray(truth, float) - middle, np.asarray(predicted, float) - middle
        error = predicted - truth
        columns = [error**2, np.abs(error), truth, predicted, truth**2, predicted**2, truth * predicted, one[:, 0]]
        return np.stack(columns, axis=1)
    if task == "single-label":
        eye = np.eye(width)
        actual, chosen = eye[truth], eye[predicted]
        exact, cost = truth == predicted, (np.asarray(truth, float) - predicted) ** 2
    elif task == "token-classification":
        correct, chosen = np.split(np.asarray(predicted, float), 2, axis=1)
        actual = np.split(np.asarray(truth, float), 2, axis=1)[1]
        exact, cost = (truth == predicted).all(axis=1), np.zeros(len(truth))
        return np.concatenate([correct, chosen, actual, exact[:, None], cost[:, None], one], axis=1, dtype=float)
    else:
        actual, chosen = np.asarray(truth, float), np.asarray(predicted, float)
        exact = (actual == chosen).all(axis=1)
        cost = np.zeros(len(truth))
    return np.concatenate([actual * chosen, chosen, actual, exact[:, None], cost[:, None], one], axis=1, dtype=float)


def sums_of(task: str, width: int, truth: Array, predicted: Array) -> Array:
    """`contributions` summed over the rows, (D,); without their N x D cells, which a thousand labels would make too many."""
    import numpy as np

    if task in ("regression", "token-classification"):
        return contributions(task, width, truth, predicted).sum(axis=0)
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if task == "single-label":
        exact = truth == predicted
        counts = [np.bincount(of, minlength=width) for of in (truth[exact], predicted, truth)]
        cost = ((truth.astype(float) - predicted) ** 2).sum()
    else:
        actual, chosen = truth > 0, predicted > 0
        exact = (actual == chosen).all(axis=1)
        counts, cost = [of.sum(axis=0) for of in (actual & chosen, chosen, actual)], 0.0
    return np.concatenate([*counts, [exact.sum(), cost, len(truth)]]).astype(float)


def from_sums(task: str, sums: Array, whole: Array | None = None) -> dict[str, Array]:
    """Metrics of decisions, (B,) each, from sums (B, D).

    Args:
        whole: the sums (D,) of the rows themselves, if `sums` are of resamples: it says which classes there are.
    """
    import numpy as np

    if task == "regression":
        return _regression(sums)
    correct, chosen, actual = parts(sums)
    whole = sums[0] if whole is None else whole
    _, there_chosen, there_actual = parts(whole)
    there, labelled = there_chosen + there_actual > 0, there_actual > 0
    each = {
        "precision": _ratio(correct, chosen),
        "recall": _ratio(correct, actual),
        "f1": _ratio(2 * correct, chosen + actual),
    }
    rows = sums[:, -1]
    share = _ratio(actual, actual.sum(axis=1, keepdims=True))
    macro = {name: _mean(values[:, there]) for name, values in each.items()}
    weighted = {f"{name}_weighted": (values * share).sum(axis=1) for name, values in each.items()}
    hits, every, true = correct.sum(axis=1), chosen.sum(axis=1), actual.sum(axis=1)
    micro = {
        "f1_micro": _ratio(2 * hits, every + true),
        "precision_micro": _ratio(hits, every),
        "recall_micro": _ratio(hits, true),
    }
    if task == "token-classification":
        entities = {name: micro[f"{name}_micro"] for name in ("f1", "precision", "recall")}
        return {**entities, "f1_macro": macro["f1"]}
    if task == "multi-label":
        return {**macro, **micro, **weighted, "subset_accuracy": sums[:, -3] / rows}
    by_chance = (chosen * actual).sum(axis=1)
    # Matthews' coefficient for K classes (Gorodkin 2004); 0 where labels or predictions are constant, as in scikit-learn.
    spread = np.sqrt((rows**2 - (chosen**2).sum(axis=1)) * (rows**2 - (actual**2).sum(axis=1)))
    places = np.arange(chosen.shape[1], dtype=float)
    first, second = (values @ places for values in (actual, chosen))
    apart = ((actual + chosen) @ places**2) - 2 * first * second / rows
    with np.errstate(invalid="ignore", divide="ignore"):
        kappa = (hits * rows - by_chance) / (rows**2 - by_chance)
        quadratic = 1 - sums[:, -2] / apart
    return {
        "accuracy": sums[:, -3] / rows,
        **macro,
        "balanced_accuracy": _mean(each["recall"][:, labelled]),
        "mcc": _ratio(hits * rows - by_chance, spread),
        "kappa": np.where(rows**2 - by_chance > 1e-12 * rows**2, kappa, np.nan),
        "kappa_quadratic": np.where(apart > 1e-12, quadratic, np.nan),
        **micro,
        **weighted,
    }


def parts(sums: Array) -> tuple[Array, Array, Array]:
    """Correct, predicted and true of each label, from sums (…, D)."""
    width = (sums.shape[-1] - 3) // 3
    return sums[..., :width], sums[..., width : 2 * width], sums[..., 2 * width : 3 * width]


def per_class(task: str, sums: Array) -> dict[str, Array]:
    """Precision, recall and F1 of each label (L,), from sums (D,); NaN where one is not defined."""
    import numpy as np

    correct, chosen, actual = parts(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "precision": correct / chosen,
            "recall": correct / actual,
            "f1": 2 * correct / (chosen + actual),
        }


def _regression(sums: Array) -> dict[str, Array]:
    import numpy as np

    rows = sums[:, -1]
    squared, absolute, x, y, xx, yy, xy = (sums[:, :-1] / rows[:, None]).T
    left, right = np.maximum(xx - x * x, 0), np.maximum(yy - y * y, 0)
    # A column of one value has a variance of a few units in the last place.
    flat = (left <= 1e-12 * xx) | (rows < 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = np.where(flat | (right <= 1e-12 * yy), np.nan, (xy - x * y) / np.sqrt(left * right))
        r2 = np.where(flat, np.nan, 1 - squared / left)
    return {
        "mse": squared,
        "mae": absolute,
        "pearson": np.clip(pearson, -1, 1),
        "rmse": np.sqrt(squared),
        "r2": r2,
    }


def ranks(values: Array) -> Array:
    """Ranks from 1 on, ties at their mean, float64 (N,); NaN where a value is. As scipy.stats, whose import takes a second."""
    import numpy as np

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean = np.cumsum(counts) - (counts - 1) / 2
    return np.full(len(values), np.nan) if np.isnan(values).any() else mean[place]


def _correlation(first: Array, second: Array) -> float:
    return float(_regression(contributions("regression", 0, first, second).sum(axis=0)[None, :])["pearson"][0])


def row_losses(task: str, truth: Array, scores: Array) -> dict[str, Array]:
    """`log_loss` and `brier` of each row, (N,).

    Log loss: minus the logarithm of the probability of the true class; multi-label, the mean over labels. Brier score: two classes,
    the squared error of the second one's probability; more classes, summed over them, as in scikit-learn; multi-label, the mean.
    """
    import numpy as np

    scores = np.asarray(scores, np.float64)
    eps = np.finfo(np.float64).eps
    likely = np.clip(scores, eps, 1 - eps)
    if task == "multi-label":
        flags = np.asarray(truth, float)
        entropy = -(flags * np.log(likely) + (1 - flags) * np.log(1 - likely))
        return {"log_loss": entropy.mean(axis=1), "brier": ((scores - flags) ** 2).mean(axis=1)}
    rows = np.arange(len(truth))
    squares = (scores - np.eye(scores.shape[1])[truth]) ** 2
    brier = squares[:, 1] if scores.shape[1] == 2 else squares.sum(axis=1)
    return {"log_loss": -np.log(likely[rows, truth]), "brier": brier}


def one_vs_rest(task: str, truth: Array, scores: Array) -> list[tuple[Array, Array]]:
    """Flags (N,) and scores (N,) of each class: the second one alone where there are two."""
    import numpy as np

    width = scores.shape[1]
    if task == "multi-label":
        return [(np.asarray(truth[:, k], bool), scores[:, k]) for k in range(width)]
    classes = [1] if width == 2 else range(width)
    return [(np.asarray(truth) == k, scores[:, k]) for k in classes]


def auroc(flags: Array, scores: Array, weights: Array | None = None) -> Any:
    """Area under the ROC curve: how often a row with the class scores higher than one without, ties counting half.

    Args:
        weights: (B, N), for B resamples at once; the result is then (B,).
    """
    import numpy as np

    positive, negative = _stacked(flags, scores, weights)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))
    return area if weights is not None else float(area[0])


def average_precision(flags: Array, scores: Array, weights: Array | None = None) -> Any:
    """Average precision, Σ (recall step) · precision over the thresholds, as in scikit-learn; `weights` as in `auroc`."""
    import numpy as np

    positive, negative = _stacked(flags, -np.asarray(scores, float), weights)
    right = np.cumsum(positive, axis=1)
    chosen = right + np.cumsum(negative, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(chosen > 0, right / chosen, 0.0)
        area = (positive * precision).sum(axis=1) / positive.sum(axis=1)
    return area if weights is not None else float(area[0])


def threshold_curves(flags: Array, scores: Array) -> tuple[Array, Array, Array]:
    """False positive rate, recall and precision at each threshold, the highest first, (U,) each."""
    import numpy as np

    positive, negative = (part[0] for part in _stacked(flags, -np.asarray(scores, float), None))
    right, wrong = np.cumsum(positive), np.cumsum(negative)
    return wrong / wrong[-1], right / right[-1], right / (right + wrong)


def _stacked(flags: Array, scores: Array, weights: Array | None) -> tuple[Array, Array]:
    """Weights of the rows with and without the class at each distinct score, ascending: (B, U) both."""
    import numpy as np

    order = np.argsort(scores, kind="stable")
    ordered = np.asarray(scores)[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(order) else np.array([], int)
    weights = np.ones((1, len(order))) if weights is None else weights
    if not len(order):
        return weights, weights
    with_it, heavy = np.asarray(flags, float)[order], weights[:, order]
    return np.add.reduceat(heavy * with_it, starts, axis=1), np.add.reduceat(heavy * (1 - with_it), starts, axis=1)


def _mean(values: Array) -> Array:
    import numpy as np

    return values.mean(axis=1) if values.shape[1] else np.full(len(values), np.nan)


def _ratio(above: Array, below: Array) -> Array:
    """0 / 0 is 0."""
    import numpy as np

    return np.divide(above, below, out=np.zeros(np.broadcast_shapes(above.shape, below.shape)), where=below > 0)
