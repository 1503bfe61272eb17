"""The prepare stage against a local Hub: pins, offline, and everything that the Hub can answer instead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.hub.server import OTHER_TOKEN, TOKEN, HubServer
from tests.tiny import dataset_card, parquet_bytes, star_names, tiny_model, tiny_reviews
from tests.unit.test_prepare import refused, result

from afina.errors import EnvironmentProblem, InputError
from afina.plan import Plan, make_plan
from afina.recipe import Recipe
from afina.site import Site
from afina.worker import store

MODEL, DATA = "me/tiny", "me/reviews"
Ran = subprocess.CompletedProcess[str]


def data_files(seed: int = 0) -> dict[str, bytes | str | Path]:
    rows = [{**row, "stars": row["stars"] - 1} for row in tiny_reviews(60, seed)]
    labels = {"stars": star_names()}
    return {
        "README.md": dataset_card(
            {"default": {"train": "train.parquet", "test": "test.parquet"}},
            labels,
            {"text": "string", "rating": "float64"},
        ),
        "train.parquet": parquet_bytes(rows[:40]),
        "test.parquet": parquet_bytes(rows[40:]),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def hub(tmp_path: Path, model: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        server.add_model(MODEL, model)
        server.add_dataset(DATA, data_files())
        yield server


@pytest.fixture(scope="module")
def checked() -> dict[str, bytes]:
    return {}


@pytest.fixture
def plan(site: Site, checked: dict[str, bytes]) -> Iterator[Callable[..., Plan]]:
    pins = site.scratch / "pins"
    pins.mkdir()
    for name, content in checked.items():
        (pins / name).write_bytes(content)

    def make(data: dict[str, Any] | None = None, **recipe: Any) -> Plan:
        data = {"hub": DATA, "text": "text", "label": "stars", "eval": {"split": "test"}, **(data or {})}
        return make_plan(
            Recipe.model_validate({"name": "t", "model": MODEL, "data": data, "tokens": {"max_length": 64}, **recipe}),
            site,
        )

    yield make
    checked.update({path.name: path.read_bytes() for path in pins.glob("checked-*.json")})


def prepare(plan: Plan, hub: HubServer, **env: str) -> Ran:
    hub.clear()
    return subprocess.run(
        [sys.executable, "-m", "afina.worker.prepare"],
        input=plan.to_json(),
        env={**os.environ, **hub.env(plan.site.cache / "huggingface"), **env},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def test_pinned_fetched_once_and_then_offline(plan: Callable[..., Plan], hub: HubServer, model: Path) -> None:
    made = plan()
    first = result(prepare(made, hub))
    assert first["labels"] == star_names() and first["rows"] == {"train": 40, "eval": 20}
    assert first["model_commit"] == hub.head("models", MODEL) and first["data_commit"] == hub.head("datasets", DATA)
    folder = Path(first["model_folder"])
    assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert Path(first["model_folder"]).is_relative_to(made.site.cache)

    assert result(prepare(made, hub)) == {**first, "reused": True} and not hub.requests
    # Another recipe of the same data and model, on a node without internet, needs nothing either.
    ran = prepare(plan(tokens={"max_length": 16}), hub, HF_HUB_OFFLINE="1")
    assert result(ran)["reused"] is False and not hub.requests
    store.verify(result(ran)["prepared"])


def test_a_pin_holds_until_it_is_refreshed(plan: Callable[..., Plan], hub: HubServer) -> None:
    made = plan()
    first = result(prepare(made, hub))
    old = first["data_commit"]
    new = hub.add_dataset(DATA, data_files(seed=1))
    assert result(prepare(made, hub))["data_commit"] == old
    ran = prepare(made, hub, AFINA_REFRESH="1")
    assert result(ran)["data_commit"] == new != old and "moved from" in ran.stderr
    assert result(ran)["digest"] != first["digest"] and result(ran)["model_commit"] == first["model_commit"]
    assert result(prepare(plan(data={"revision": old}), hub))["digest"] == first["digest"]


def test_a_name_without_an_owner(plan: Callable[..., Plan], hub: HubServer) -> None:
    hub.move("reviews", DATA)
    assert result(prepare(plan(data={"hub": "reviews"}), hub))["data_commit"] == hub.head("datasets", DATA)


def test_a_truncated_cache_is_fetched_again(plan: Callable[..., Plan], hub: HubServer) -> None:
    made = plan()
    first = result(prepare(made, hub))
    weights = Path(first["model_folder"]) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    ran = prepare(made, hub)
    assert result(ran)["model_folder"] == first["model_folder"] and "fetching it again" in ran.stderr
    assert weights.read_bytes() == whole
    weights.resolve().unlink()
    assert "afina prefetch RECIPE" in refused(prepare(made, hub, HF_HUB_OFFLINE="1"), EnvironmentProblem.exit_code)
    assert result(prepare(made, hub))["reused"] is True and weights.read_bytes() == whole


FAULTS: list[tuple[str, str, dict[str, Any], dict[str, str], list[str]]] = [
    ("gated", MODEL, {}, {}, [f"model {MODEL} is gated", f"accept them on https://huggingface.co/{MODEL}"]),
    ("gated", DATA, {}, {"HF_TOKEN": OTHER_TOKEN}, [f"data set {DATA} is gated", f"huggingface.co/datasets/{DATA}"]),
    ("private", MODEL, {}, {}, [f"no model {MODEL} on the Hub, or it is private", "HF_TOKEN"]),
    ("missing", DATA, {}, {"HF_TOKEN": TOKEN}, [f"no data set {DATA} on the Hub", "with the token in use"]),
    ("rate_limit", MODEL, {"retry_after": 300}, {}, ["(429)", "again in 300 s"]),
    ("rate_limit", DATA, {"retry_after": 300, "scope": "files"}, {}, ["(429)", "again in 300 s"]),
    ("error", MODEL, {"status": 503}, {}, ["the Hub has a fault (503)", "later"]),
    ("cut", MODEL, {"after_bytes": 1000}, {}, ["the transfer broke off", "it resumes"]),
]


@pytest.mark.parametrize("kind, repo, options, env, expected", FAULTS, ids=[f"{f[0]}-{f[1]}" for f in FAULTS])
def test_what_the_hub_says_instead(
    plan: Callable[..., Plan],
    hub: HubServer,
    kind: str,
    repo: str,
    options: dict[str, Any],
    env: dict[str, str],
    expected: list[str],
) -> None:
    made = plan()
    hub.fault(repo, kind, **options)
    said = refused(prepare(made, hub, **env), EnvironmentProblem.exit_code)
    for words in expected:
        assert words in said
    assert not made.site.prepared.exists()
    assert not list(made.site.cache.glob("datasets/*"))
    hub.heal()
    assert result(prepare(made, hub, HF_TOKEN=TOKEN))["reused"] is False


@pytest.mark.parametrize(
    "kind, options", [("rate_limit", {"retry_after": 1, "times": 2}), ("reset", {"after_bytes": 500, "times": 2})]
)
def test_what_passes_is_waited_for(
    plan: Callable[..., Plan], hub: HubServer, kind: str, options: dict[str, Any]
) -> None:
    fault = hub.fault(MODEL, kind, **options)
    result(prepare(plan(), hub))
    assert fault.hits == 2


def test_a_token_that_is_wrong(plan: Callable[..., Plan], hub: HubServer) -> None:
    assert "refuses your token (401)" in refused(
        prepare(plan(), hub, HF_TOKEN="hf_wrong"), EnvironmentProblem.exit_code
    )


def test_no_network_and_nothing_fetched(plan: Callable[..., Plan], hub: HubServer) -> None:
    said = refused(prepare(plan(), hub, HF_HUB_OFFLINE="1"), EnvironmentProblem.exit_code)
    assert "run `afina prefetch RECIPE` on a node with internet" in said and not hub.requests
    said = refused(prepare(plan(), hub, HF_ENDPOINT="http://127.0.0.1:9"), EnvironmentProblem.exit_code)
    assert "cannot be reached" in said and "afina prefetch RECIPE" in said


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"revision": "mian"}, ["revision: model me/tiny has no revision `mian`", "did you mean `main`?"]),
        ({"data": {"revision": "v9"}}, ["data.revision: data set me/reviews has no revision `v9`", "known: main"]),
        ({"data": {"config": "defalt"}}, ["no configuration `defalt`", "did you mean `default`?"]),
        (
            {"data": {"eval": {"split": "tets"}}},
            ["`tets` is not a split of me/reviews", "did you mean `test`? known: train, test"],
        ),
        ({"data": {"text": "txt"}}, ["me/reviews/train: there is no column `txt`", "did you mean `text`?"]),
        ({"train": {"arguments": {"warmup_ratio": 0.1}}}, ["warmup_ratio", "warmup_steps"]),
    ],
)
def test_what_the_recipe_gets_wrong(
    plan: Callable[..., Plan], hub: HubServer, change: dict[str, Any], expected: list[str]
) -> None:
    said = refused(prepare(plan(**change), hub), InputError.exit_code)
    for words in expected:
        assert words in said
