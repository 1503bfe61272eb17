"""Simple models beside a run: TF-IDF against scikit-learn's own, each task, samples, and labels that train lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from tests.tiny import tiny_reviews

from afina.statistics.weakness import beaten
from afina.worker.data import tfidf
from afina.worker.data.prepared import Split
from afina.worker.data.tfidf import fit_tfidf

STARS = tiny_reviews(300, 3)
TEXTS = [row["text"] for row in STARS]
WORDS = {word: number for number, word in enumerate(sorted({word for text in TEXTS for word in text.split()}), 5)}


def _splits(labels: Any, weights: Any = None) -> dict[str, Split]:
    """The first 200 rows to train on, the others to predict; each between the special tokens 0 and 1."""
    rows = [[0, *(WORDS[word] for word in text.split()), 1] for text in TEXTS]
    ends = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    whole = Split(np.concatenate(rows).astype(np.uint16), ends, np.asarray(labels), None, weights)
    return {"train": whole.take(np.arange(200)), "eval": whole.take(np.arange(200, 300))}


def _features() -> tuple[Any, Any]:
    """As scikit-learn makes them of the same texts."""
    texts = [f"<s> {' '.join(text.split())} </s>" for text in TEXTS]
    vectorizer = TfidfVectorizer(lowercase=False, token_pattern=r"\S+", ngram_range=(1, 2), min_df=2, max_df=199)
    return vectorizer.fit_transform(texts[:200]), vectorizer.transform(texts[200:])


def test_each_task_is_scikit_learns_model_on_scikit_learns_features() -> None:
    train, rest = _features()
    stars = np.array([row["stars"] - 1 for row in STARS])
    model = fit_tfidf("single-label", _splits(stars), 5)
    expected = LogisticRegression().fit(train, stars[:200]).decision_function(rest)
    np.testing.assert_allclose(model.logits["eval"], expected, atol=2e-2)
    assert (model.logits["eval"].argmax(1) == stars[200:]).mean() > 0.8, "the words tell the stars"
    assert (model.name, model.rows, model.of) == ("TF-IDF and logistic regression", 200, 200)
    flags = np.stack([stars > 2, stars < 2, stars < 9], axis=1).astype(np.float32)
    several = fit_tfidf("multi-label", _splits(flags), 3).logits["eval"]
    expected = LogisticRegression().fit(train, flags[:200, 0]).decision_function(rest)
    np.testing.assert_allclose(several[:, 0], expected, atol=2e-2)
    assert (several[:, 2] > 0).all(), "a label that every row has"
    ratings = np.array([row["rating"] for row in STARS], np.float32)
    ridge = fit_tfidf("regression", _splits(ratings), 1)
    expected = Ridge(tol=1e-6).fit(train, ratings[:200]).predict(rest)
    np.testing.assert_allclose(ridge.logits["eval"][:, 0], expected, atol=2e-2)
    assert ridge.name == "TF-IDF and ridge regression"


def test_two_classes_absent_ones_and_rows_that_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    low = np.array([int(row["stars"] > 3) for row in STARS])
    logits = fit_tfidf("single-label", _splits(low), 3).logits["eval"]
    assert (logits[:, 2] < logits[:, :2].max(1)).all() and (logits.argmax(1) == low[200:]).mean() > 0.8
    assert (fit_tfidf("single-label", _splits(np.full(300, 1)), 3).logits["eval"].argmax(1) == 1).all()
    wrong = np.where(np.arange(300) % 2, low, 1 - low)
    counted = fit_tfidf("single-label", _splits(wrong, (np.arange(300) % 2).astype(np.float32)), 2).logits["eval"]
    assert (counted.argmax(1) == low[200:]).mean() > 0.7, "rows of weight 0 have the wrong label"
    monkeypatch.setattr(tfidf, "_MOST_CELLS", 3000)
    sampled = [fit_tfidf("single-label", _splits(low), 2) for _ in range(2)]
    assert sampled[0].rows < sampled[0].of == 200
    assert (sampled[0].logits["eval"] == sampled[1].logits["eval"]).all(), "the seed is fixed"


def test_a_model_that_does_not_beat_it_is_named_by_its_own_direction() -> None:
    def of(metric: str, simple: float, mine: float) -> dict[str, Any]:
        models = [{"name": n, "differences": [{"metric": metric, "first": simple, "second": mine}]} for n in "ab"]
        return {"eval": models}

    assert beaten(of("accuracy", 0.8, 0.8)) == ["the model is not better than b: accuracy on eval 0.8 against 0.8"]
    assert beaten(of("accuracy", 0.8, 0.81)) == [] == beaten(of("mse", 0.5, 0.4)) == beaten({"eval": [{"name": "a"}]})
    assert beaten(of("mse", 0.4, 0.5)) == ["the model is not better than b: mse on eval 0.5 against 0.4"]
