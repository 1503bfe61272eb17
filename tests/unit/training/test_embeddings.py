"""Frozen embeddings: those of plain Transformers row by row; a linear model on them; and less time than all rows take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tests.architectures import architecture_folder
from transformers import AutoModel

from afina.errors import EnvironmentProblem, InputError
from afina.recipe.schema import Recipe
from afina.run.plan import make_plan
from afina.site.settings import Site
from afina.statistics.predictions import Predictions
from afina.worker.data.linear_model import SimpleModel, stratified_order
from afina.worker.data.prepared import Split
from afina.worker.inference import embeddings, simple_models
from afina.worker.inference.embeddings import Embedder, fit_embeddings

LENGTHS = (5, 17, 1, 9, 9, 3, 30)
ENDS = np.concatenate([[0], np.cumsum(LENGTHS)])
SPLIT = Split(np.random.default_rng(0).integers(5, 40, ENDS[-1]), ENDS, np.array([0, 1, 0, 1, 0, 1, 0]))


def _embedder(folder: Path, **changes: Any) -> Embedder:
    data = {"files": {"all": "d.csv"}, "text": "text", "label": "stars"}
    recipe = Recipe.model_validate({"name": "t", "model": str(folder), "data": data, **changes})
    manifest = {"labels": ["a", "b"], "num_labels": 2, "task": "single-label", "pad_token_id": 0}
    return Embedder(recipe, folder, manifest, "cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bert", "gpt2", "xlnet", "t5"])
def test_an_embedding_is_the_mean_of_the_pretrained_models_vectors(kind: str, tmp_path: Path) -> None:
    folder = architecture_folder(tmp_path, kind, None)
    order = np.array([6, 2, 0, 1, 3, 5, 4])
    found = _embedder(folder, adapter={"rank": 2}).embed(SPLIT, order, np.inf)
    body = AutoModel.from_pretrained(folder).eval()
    body = body.get_encoder() if body.config.is_encoder_decoder else body

    def alone(start: int, end: int) -> Any:
        ids = torch.from_numpy(SPLIT.tokens[start:end])[None]
        return body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0).detach().numpy()

    wanted = np.stack([alone(ENDS[row], ENDS[row + 1]) for row in order])
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    if kind == "bert":  # three windows as one row, in the middle
        bounds = np.array([0, 5, 22, 23, 32])
        split = Split(SPLIT.tokens, np.array([0, 5, 23, 32]), np.zeros(3), windows=bounds)
        three = [alone(0, 5), (alone(5, 22) + alone(22, 23)) / 2, alone(23, 32)]
        np.testing.assert_allclose(_embedder(folder).embed(split, np.arange(3), np.inf), three, atol=1e-5)


def test_what_cannot_be_embedded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="rows of unequal lengths cannot share a batch \\(fnet"):
        _embedder(architecture_folder(tmp_path / "fnet", "fnet", None))
    monkeypatch.setattr(embeddings, "free_memory", lambda: 1000)
    with pytest.raises(EnvironmentProblem, match=r"of memory may be needed, 1\.0 kB are free"):
        _embedder(tmp_path / "fnet")


class _Slow:
    """Gives two features of the first token, and takes `seconds` for each row, by a clock of its own."""

    width = 2

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds, self.now = seconds, 0.0

    def monotonic(self) -> float:
        return self.now

    def embed(self, split: Split, order: Any, deadline: float) -> Any:
        rows = []
        for row in order:
            if self.now + self._seconds > deadline:
                break
            self.now += self._seconds
            rows.append([split.tokens[split.offsets[row]], 1.0])
        return np.array(rows, np.float32)


def _splits(count: int) -> dict[str, Split]:
    draw = np.random.default_rng(1)
    values, ends = draw.normal(size=count), np.arange(count + 1)
    labels = (values + draw.normal(size=count) > 0.5).astype(np.int64)
    return {name: Split(values, ends, labels) for name in ("train", "eval")}


def test_it_is_scikit_learns_model_on_standardised_features_in_the_order_of_the_rows(monkeypatch: Any) -> None:
    splits = _splits(300)
    model: Any = fit_embeddings(_Slow(), "single-label", splits, 2, 60.0)  # type: ignore[arg-type]
    features = np.stack([splits["train"].tokens, np.ones(300)], axis=1)
    features = StandardScaler().fit_transform(features)
    expected = LogisticRegression().fit(features, splits["train"].labels).decision_function(features)
    np.testing.assert_allclose(model.logits["eval"][:, 1] - model.logits["eval"][:, 0], expected, atol=1e-3)
    assert (model.rows, model.of, model.samples, model.cut_after_s) == (300, 300, {}, None)
    monkeypatch.setattr(embeddings, "_MOST_VALUES", 240)  # two features of 120 rows
    model = fit_embeddings(_Slow(), "single-label", splits, 2, 60.0)  # type: ignore[arg-type]
    assert (model.rows, model.of, model.cut_after_s) == (120, 300, None)
    rows = model.samples["eval"]
    assert (np.diff(rows) > 0).all() and len(rows) == 120 == len(model.logits["eval"])
    margins = model.logits["eval"][:, 1] - model.logits["eval"][:, 0]
    assert np.corrcoef(margins, splits["eval"].tokens[rows])[0, 1] > 0.999, "each row has its own"


def test_rows_that_there_is_no_time_for_are_left_out_and_too_few_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(limit_s: float) -> Any:
        slow: Any = _Slow(1 / 128)
        monkeypatch.setattr(embeddings, "time", slow)
        return fit_embeddings(slow, "single-label", _splits(2000), 2, limit_s)

    model = fit(6.0)
    assert (len(model.samples["eval"]), model.rows, model.cut_after_s) == (192, 576, 6.0)
    with pytest.raises(EnvironmentProblem, match="64 of 2,000 rows of eval were embedded in 2 s"):
        fit(2.0)
    with pytest.raises(EnvironmentProblem, match="0 of 2,000 rows of eval were embedded in 0 s"):
        fit(-3.0)  # the process took all of the time to start


def test_every_beginning_of_the_order_is_stratified() -> None:
    labels = np.repeat([0, 1, 2], [700, 250, 50])
    order = stratified_order("single-label", labels)
    assert sorted(order.tolist()) == list(range(1000))
    for count in (20, 100, 333):
        shares = np.bincount(labels[order[:count]], minlength=3) / count
        assert np.abs(shares - [0.7, 0.25, 0.05]).max() <= 1.5 / count * 3
    flags = np.stack([labels >= 0, labels == 2, labels == 1], axis=1)
    counts = flags[stratified_order("multi-label", flags)[:100]].sum(0)
    assert counts[0] == 100 and abs(counts[1] - 5) <= 1 and abs(counts[2] - 25) <= 2


def test_a_sample_of_rows_is_compared_with_the_run_on_the_same_rows() -> None:
    truth = np.repeat([0, 1], 30)
    right = np.arange(60) % 3 > 0
    mine = Predictions(
        "single-label",
        ("a", "b"),
        truth,
        np.where(right, truth, 1 - truth),
        np.eye(2)[truth],
        pa.table({"row": range(60)}),
    )
    rows = np.arange(0, 60, 2)
    logits = np.eye(2, dtype=np.float32)[truth[rows]] * 5
    model = SimpleModel("simple", "over few", 10, 20, 1.0, {"eval": logits}, 9.0, {"eval": rows})
    record = simple_models._beside(mine, model, "eval", ["accuracy"])
    (difference,) = record["differences"]
    assert record["compared"] == [30, 60] and record["scores"]["accuracy"][0] == difference["first"] == 1
    assert difference["second"] == right[rows].mean() and record["rows"] == 10
    whole = SimpleModel("simple", "over few", 10, 20, 1.0, {"eval": np.eye(2, dtype=np.float32)[truth]})
    assert simple_models._beside(mine, whole, "eval", ["accuracy"])["compared"] == [60, 60]


def test_one_that_time_cut_short_is_made_again_when_there_is_more_than_twice_the_time(site: Site, recipe: Any) -> None:
    plan, made = make_plan(recipe(), site), []

    def kept(limit_s: float, cut_after_s: float | None) -> None:
        def fit() -> SimpleModel:
            made.append(limit_s)
            return SimpleModel(
                "m", "f", 1, 2, 0.0, {"eval": np.zeros((2, 2), np.float32)}, cut_after_s, {"eval": np.array([1, 3])}
            )

        found = simple_models._kept(plan, ["some data"], fit, limit_s)
        assert found.samples["eval"].tolist() == [1, 3] and list(found.logits) == ["eval"]

    for limit_s, cut_after_s in ((10.0, 10.0), (20.0, 20.0), (21.0, None), (60.0, 60.0)):
        kept(limit_s, cut_after_s)
    assert made == [10.0, 21.0]
