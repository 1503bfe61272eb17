"""The prepare stage against a local Hub: pins, offline, and everything that the Hub can answer instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.hub.server import OTHER_TOKEN, TOKEN, HubServer
from tests.tiny import star_names
from tests.unit.conftest import private_mounts
from tests.unit.data import stage
from tests.unit.data.stage import refused, result
from tests.unit.model_hub.conftest import DATA, MODEL, data_files

from afina.errors import EnvironmentProblem, InputError, SiteError
from afina.recipe.schema import Recipe
from afina.run.plan import Plan, make_plan
from afina.site.settings import Site
from afina.worker.data import prepared
from afina.worker.model.model_files import verify_model


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


def prepare(plan: Plan, hub: HubServer, **env: str) -> stage.Ran:
    hub.clear()
    return stage.prepare(plan, env={**hub.env(plan.site.cache / "huggingface"), **env})


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
    prepared.verify(result(ran)["prepared"])


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
    hub.add_dataset(DATA, data_files(seed=2))
    hub.fault(DATA, "gated")
    assert "is gated" in refused(prepare(made, hub, AFINA_REFRESH="1"), EnvironmentProblem.exit_code), "not old rows"


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


def flip(path: Path) -> bytes:
    """Change one bit in the middle, in place, as a bad disk does; returns what was there."""
    raw = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(raw) // 2)
        file.write(bytes([raw[len(raw) // 2] ^ 1]))
    return raw


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_bit_of_the_cached_model(plan: Callable[..., Plan], hub: HubServer, name: str) -> None:
    """A large file has its SHA-256 on the Hub, a small one the SHA-1 of git: either is compared."""
    made = plan()
    first = result(prepare(made, hub))
    verify_model(first)
    path = Path(first["model_folder"]) / name
    with path.open("rb") as reader:
        whole = flip(path)
        with pytest.raises(SiteError) as error:
            verify_model(first)
        assert str(path) in error.value.message and "afina prefetch RECIPE" in error.value.remedy
        message = refused(prepare(made, hub, HF_HUB_OFFLINE="1"), EnvironmentProblem.exit_code)
        assert "afina prefetch RECIPE" in message and str(path) in message
        altered = path.read_bytes()
        ran = prepare(made, hub)
        assert (
            result(ran) == {**first, "reused": True} and f"{path}: its content is not what the Hub holds" in ran.stderr
        )
        assert path.read_bytes() == whole
        fetched = {r.path.rpartition("/")[2] for r in hub.requests if r.method == "GET" and "/resolve/" in r.path}
        assert fetched <= {name}, "only what was damaged"
        assert reader.read() == altered, "a job that has it open keeps it"
    verify_model(first)


def test_one_bit_of_the_fetched_data(plan: Callable[..., Plan], hub: HubServer) -> None:
    made = plan()
    first = result(prepare(made, hub))
    parquet = next(made.site.cache.glob("datasets/*/*train.parquet"))
    whole = flip(parquet)
    assert result(prepare(made, hub))["reused"] is True and not hub.requests, "nobody reads it"
    ran = prepare(plan(tokens={"max_length": 16}), hub)
    assert result(ran)["reused"] is False and "again, because the local copy is damaged" in ran.stderr
    assert parquet.read_bytes() == whole
    prepared.verify(first["prepared"])


def test_two_that_fetch_at_once(plan: Callable[..., Plan], hub: HubServer) -> None:
    made = plan()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "afina.worker", "prepare"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **hub.env(made.site.cache / "huggingface")},
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(made.to_json().encode())
        process.stdin.close()
        process.stdin = None
    message = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, message
    weights = [r for r in hub.requests if r.origin == "cdn" and r.method == "GET" and "model.safetensors" in r.path]
    assert len(weights) == 1, "each file comes once over the network"
    assert sum(r.method == "GET" and r.path.endswith("train.parquet") and r.origin == "cdn" for r in hub.requests) == 1
    assert not [p for folder in ("pins", "prepared", "cache/datasets") for p in (made.site.scratch / folder).glob(".*")]


def test_a_read_only_cache_that_lacks_the_model(plan: Callable[..., Plan], hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "caches of the site"
    home.mkdir()
    (tmp_path / "plan.json").write_text(plan().to_json())
    variables = {**hub.env(home), "HF_HOME": str(home)}
    script = 'mount --bind "$3" "$3"; mount -o remount,bind,ro "$3"; program=$1; plan=$2; shift 3\n'
    script += 'exec env "$@" "$program" -m afina.worker prepare < "$plan"'
    pairs = [f"{name}={value}" for name, value in variables.items()]
    message = refused(private_mounts(script, sys.executable, tmp_path / "plan.json", home, *pairs), 3)
    assert str(home) in message and f"the cache does not hold {MODEL}, and cannot be written" in message
    assert "unset HF_HOME" in message


def test_code_of_a_third_party_is_refused(plan: Callable[..., Plan], hub: HubServer, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "somebody/else--configuration.Config"}
    files: dict[str, bytes | str | Path] = {p.name: p for p in model.iterdir()}
    commit = hub.add_model("me/code", {**files, "config.json": json.dumps(config)})
    made = plan(model="me/code", revision=commit, trust_remote_code=True)
    message = refused(prepare(made, hub), InputError.exit_code)
    assert "takes code from another repository, whose revision nothing pins" in message


FAULTS: list[tuple[str, str, dict[str, Any], dict[str, str], list[str]]] = [
    ("gated", MODEL, {}, {}, [f"model {MODEL} is gated", f"accept them on https://huggingface.co/{MODEL}"]),
    ("gated", DATA, {}, {"HF_TOKEN": OTHER_TOKEN}, [f"data set {DATA} is gated", f"huggingface.co/datasets/{DATA}"]),
    ("private", MODEL, {}, {}, [f"no model {MODEL} on the Hub, or it is private", "HF_TOKEN"]),
    ("missing", DATA, {}, {"HF_TOKEN": TOKEN}, [f"no data set {DATA} on the Hub", "with the token in use"]),
    ("rate_limit", MODEL, {"retry_after": 300}, {}, ["(429)", "again in 300 s"]),
    ("rate_limit", DATA, {"retry_after": 300, "scope": "files"}, {}, ["(429)", "again in 300 s"]),
    ("error", MODEL, {"status": 503}, {}, ["the Hub reports an error (503)", "later"]),
    ("cut", MODEL, {"after_bytes": 1000}, {}, ["the transfer broke off", "it resumes"]),
]


@pytest.mark.parametrize("kind, repo, options, env, expected", FAULTS, ids=[f"{f[0]}-{f[1]}" for f in FAULTS])
def test_each_error_of_the_hub_has_its_message(
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
    message = refused(prepare(made, hub, **env), EnvironmentProblem.exit_code)
    for words in expected:
        assert words in message
    assert not made.site.prepared.exists()
    assert not list(made.site.cache.glob("datasets/*"))
    if kind == "cut":
        hub.heal()
        assert result(prepare(made, hub, HF_TOKEN=TOKEN))["reused"] is False


@pytest.mark.parametrize(
    "kind, options", [("rate_limit", {"retry_after": 1, "times": 2}), ("reset", {"after_bytes": 500, "times": 2})]
)
def test_a_short_limit_is_waited_for(
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
    message = refused(prepare(plan(), hub, HF_HUB_OFFLINE="1"), EnvironmentProblem.exit_code)
    assert "run `afina prefetch RECIPE` on a node with internet" in message and not hub.requests
    message = refused(prepare(plan(), hub, HF_ENDPOINT="http://127.0.0.1:9"), EnvironmentProblem.exit_code)
    assert "cannot be reached" in message and "afina prefetch RECIPE" in message


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
    ],
)
def test_errors_of_the_recipe(
    plan: Callable[..., Plan], hub: HubServer, change: dict[str, Any], expected: list[str]
) -> None:
    message = refused(prepare(plan(**change), hub), InputError.exit_code)
    for words in expected:
        assert words in message
