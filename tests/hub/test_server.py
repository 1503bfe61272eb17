"""The test hub against the real clients: each check runs in a fresh Python that knows the hub by its environment only.

A client process counts its own network contacts with an audit hook, so "nothing else was reached" includes name
look-ups. Several checks share a process where the imports would dominate.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.hub.server import OTHER_TOKEN, TOKEN, HubServer

_REPOSITORY = Path(__file__).parents[2]
_NO_COMMIT = "a" * 40

# Puts every address that is looked up or connected to, other than the loopback's, into the answer.
_CLIENT = """
import json, sys
elsewhere = []
def watch(event, args):
    if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", b"127.0.0.1"):
        elsewhere.append(str(args[0]))
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] != "127.0.0.1":
        elsewhere.append(str(args[1]))
sys.addaudithook(watch)
given = json.loads(sys.argv[1])
result = {}
def attempt(call, *args, **options):
    # The class, the status and the server's own words of what a call raises, and of what caused it.
    import time
    start = time.monotonic()
    try:
        call(*args, **options)
    except Exception as error:
        causes = []
        while error is not None:
            response = getattr(error, "response", None)
            causes.append([type(error).__name__, getattr(response, "status_code", None),
                           getattr(error, "server_message", None)])
            error = error.__cause__ or error.__context__
        return {"errors": causes, "seconds": time.monotonic() - start}
    return {"errors": [], "seconds": time.monotonic() - start}
%s
print("\\n" + json.dumps({"result": result, "elsewhere": elsewhere}))
"""


class Client:
    """Runs code that finds `given` and fills `result`; fails with the code's own traceback."""

    def __init__(self, hub: HubServer, folder: Path):
        self.hub, self.folder = hub, folder
        self.elsewhere: list[str] = []

    def run(self, code: str, given: Any = None, home: str = "home", **env: str) -> Any:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = inherited | self.hub.env(self.folder / home) | {"HOME": str(self.folder)} | env
        done = subprocess.run(
            [sys.executable, "-c", _CLIENT % textwrap.dedent(code), json.dumps(given)],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout.splitlines()[-1])
        self.elsewhere = answer["elsewhere"]
        return answer["result"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head. Built in a process of its own, so that this one never imports torch."""
    folder = tmp_path_factory.mktemp("model")
    code = f"from pathlib import Path; from tests import tiny; tiny.tiny_model(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=_REPOSITORY, check=True, capture_output=True)
    return folder


def _labelled(n: int, seed: int) -> list[dict[str, Any]]:
    return [{"text": row["text"], "label": row["stars"] - 1} for row in tiny.tiny_reviews(n, seed)]


def _csv_dataset(folder: Path, train: int = 40) -> dict[str, Path | str]:
    files = {"train": train, "test": 20}
    for seed, (split, rows) in enumerate(files.items()):
        tiny.write_csv(folder / f"{split}.csv", _labelled(rows, seed))
    card = tiny.dataset_card(
        {"reviews": {"train": "train.csv", "test": "data/test.csv"}}, {"label": tiny.star_names()}, {"text": "string"}
    )
    return {"README.md": card, "train.csv": folder / "train.csv", "data/test.csv": folder / "test.csv"}


def test_a_pinned_model_stays_what_it_was(hub: HubServer, client: Client, model: Path) -> None:
    first = hub.add_model("tester/tiny-bert", model)
    second = hub.add_model("tester/tiny-bert", {"config.json": '{"model_type": "bert"}', "sub/folder/new.txt": "new"})
    assert re.fullmatch("[0-9a-f]{40}", first) and first != second
    hub.add_model("google-bert/tiny", model)
    hub.move("tiny", "google-bert/tiny")
    hub.page_size = 2
    result = client.run(
        """
        import os
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import EntryNotFoundError
        api = HfApi()
        result["head"] = api.model_info("tester/tiny-bert").sha
        result["at"] = api.model_info("tester/tiny-bert", revision=given, files_metadata=True).siblings[0].size
        result["refs"] = api.list_repo_refs("tester/tiny-bert").branches[0].target_commit
        result["commits"] = [commit.commit_id for commit in api.list_repo_commits("tester/tiny-bert")]
        result["legacy"] = api.model_info("tiny").id
        result["tree"] = sorted(item.path for item in api.list_repo_tree("tester/tiny-bert", recursive=True))
        result["paths"] = [info.path for info in api.get_paths_info("tester/tiny-bert", ["sub/folder/new.txt", "no"])]
        folder = snapshot_download("tester/tiny-bert", revision=given)
        result["pinned"] = {name: os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)}
        result["folder"] = os.path.basename(folder)
        result["main"] = sorted(os.listdir(snapshot_download("tester/tiny-bert")))
        result["legacy file"] = os.path.getsize(hf_hub_download("tiny", "model.safetensors"))
        result["absent"] = attempt(hf_hub_download, "tester/tiny-bert", "absent.txt")
        """,
        first,
    )
    sizes = {path.name: path.stat().st_size for path in model.iterdir()}
    assert (result["head"], result["refs"], result["folder"]) == (second, second, first)
    assert result["commits"] == [second, first]
    assert result["at"] == sizes["config.json"]
    assert result["tree"] == ["config.json", "sub", "sub/folder", "sub/folder/new.txt"]
    assert result["paths"] == ["sub/folder/new.txt"]
    assert result["pinned"] == sizes
    assert result["main"] == ["config.json", "sub"]
    assert result["legacy"] == "google-bert/tiny"
    assert result["legacy file"] == sizes["model.safetensors"]
    assert result["absent"]["errors"][0][:2] == ["RemoteEntryNotFoundError", 404]
    # Weights came from the second origin, over plain HTTP; nothing else was contacted.
    assert any(request.origin == "cdn" and request.path.endswith("model.safetensors") for request in hub.requests)
    assert not any("xet" in request.path.lower() for request in hub.requests)
    assert client.elsewhere == []


@pytest.mark.slow
def test_from_pretrained_then_offline(hub: HubServer, client: Client, model: Path) -> None:
    pinned = hub.add_model("tester/tiny-bert", model)
    hub.add_model("tester/tiny-bert", {"README.md": "emptied"})
    code = """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained("tester/tiny-bert", revision=given)
        model = AutoModelForSequenceClassification.from_pretrained("tester/tiny-bert", revision=given, num_labels=5)
        batch = tokenizer(["excellent food", "a terrible waste"], padding=True, return_tensors="pt")
        result["logits"] = list(model(**batch).logits.shape)
        result["unknown"] = int((batch["input_ids"] == tokenizer.unk_token_id).sum())
        result["weight"] = float(next(model.base_model.parameters()).detach().double().sum())
        """
    online = client.run(code, pinned)
    assert online["logits"] == [2, 5] and online["unknown"] == 0
    assert client.elsewhere == []
    assert hub.requests
    hub.clear()
    assert client.run(code, pinned, HF_HUB_OFFLINE="1") == online
    assert hub.requests == [] and client.elsewhere == []


def test_load_dataset_pinned_then_offline(hub: HubServer, client: Client, tmp_path: Path) -> None:
    pinned = hub.add_dataset("tester/tiny-reviews", _csv_dataset(tmp_path))
    hub.add_dataset("tester/tiny-reviews", _csv_dataset(tmp_path, train=7))
    labels = {"label": tiny.star_names()}
    parquet = tiny.parquet_bytes(_labelled(30, 5), labels)
    card = tiny.dataset_card({"full": {"train": "full/train-*", "test": "full/test-*"}, "half": {"train": "half/*"}})
    files = {"full/train-0.parquet": parquet, "full/test-0.parquet": parquet, "half/train-0.parquet": parquet}
    renamed = hub.add_dataset("tester/tiny_review_full", {"README.md": card, **files})
    hub.move("tiny_review_full", "tester/tiny_review_full")
    code = """
        import datasets
        datasets.disable_progress_bars()
        csv, parquet = given
        loaded = datasets.load_dataset("tester/tiny-reviews", "reviews", revision=csv)
        result["rows"] = {split: len(rows) for split, rows in loaded.items()}
        result["names"] = loaded["train"].features["label"].names
        result["texts"] = loaded["test"]["text"][:]
        loaded = datasets.load_dataset("tester/tiny_review_full", "full", revision=parquet)
        result["parquet"] = {split: len(rows) for split, rows in loaded.items()}
        result["parquet names"] = loaded["train"].features["label"].names
        """
    listing = """
        from huggingface_hub import HfApi, snapshot_download
        result["configs"] = datasets.get_dataset_config_names("tester/tiny_review_full", revision=parquet)
        result["splits"] = datasets.get_dataset_split_names("tester/tiny_review_full", "half", revision=parquet)
        builder = datasets.load_dataset_builder("tester/tiny-reviews", revision=csv)
        result["features"] = list(builder.info.features)
        result["hash"] = builder.hash
        # An old name without an owner: load_dataset refuses it, the Hub's answer holds the name it has today.
        result["old name"] = attempt(datasets.load_dataset, "tiny_review_full", "full", revision=parquet)["errors"][0]
        result["new name"] = HfApi().dataset_info("tiny_review_full").id
        folder = snapshot_download("tiny_review_full", repo_type="dataset", revision=parquet)
        result["folder names"] = datasets.load_dataset(folder, "full")["train"].features["label"].names
        folder = snapshot_download("tester/tiny-reviews", repo_type="dataset", revision=csv)
        loaded = datasets.load_dataset(folder, "reviews")
        result["folder rows"] = {split: len(rows) for split, rows in loaded.items()}
        result["folder features"] = {key: type(kind).__name__ for key, kind in loaded["train"].features.items()}
        """
    online = client.run(code + listing, [pinned, renamed])
    assert online["rows"] == {"train": 40, "test": 20}
    assert online["texts"] == [row["text"] for row in _labelled(20, 1)]
    assert online["names"] == online["parquet names"] == online["folder names"] == tiny.star_names()
    assert online["parquet"] == {"train": 30, "test": 30}
    assert online["old name"] == ["HfUriError", None, None] and online["new name"] == "tester/tiny_review_full"
    assert online["folder rows"] == online["rows"]
    assert online["folder features"] == {"text": "Value", "label": "ClassLabel"}
    assert online["configs"] == ["full", "half"] and online["splits"] == ["train"]
    assert online["features"] == ["text", "label"] and online["hash"] == pinned
    # A pinned load asks neither the data set viewer nor the S3 bucket; an unpinned one looks up the viewer's name.
    assert client.elsewhere == []
    hub.clear()
    offline = client.run(code, [pinned, renamed], HF_HUB_OFFLINE="1")
    assert offline == {key: online[key] for key in offline}
    assert hub.requests == [] and client.elsewhere == []


def test_load_dataset_takes_another_revision_from_the_cache(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """A fact about `datasets` 5.2 that a caller must defend against; `snapshot_download` does not share it."""
    old = hub.add_dataset("tester/tiny-reviews", _csv_dataset(tmp_path))
    new = hub.add_dataset("tester/tiny-reviews", _csv_dataset(tmp_path, train=7))
    code = """
        import datasets
        datasets.disable_progress_bars()
        result["rows"] = len(datasets.load_dataset("tester/tiny-reviews", "reviews", revision=given)["train"])
        result["hash"] = datasets.load_dataset_builder("tester/tiny-reviews", "reviews", revision=given).hash
        """
    assert client.run(code, old) == {"rows": 40, "hash": old}
    hub.fault("tester/tiny-reviews", "gated")
    assert client.run(code, new) == {"rows": 40, "hash": old}  # no error, and not what was asked for
    snapshot = """
        from huggingface_hub import snapshot_download
        result["errors"] = attempt(snapshot_download, "tester/tiny-reviews", repo_type="dataset", revision=given)["errors"]
        """
    assert client.run(snapshot, new)["errors"][0][:2] == ["GatedRepoError", 401]
    hub.heal()
    assert client.run(code, new) == {"rows": 7, "hash": new}


_FAULTS: dict[str, tuple[str | None, dict[str, Any], str | None]] = {
    "fine": (None, {}, None),
    "gated": ("gated", {}, None),
    "not-listed": ("gated", {}, OTHER_TOKEN),
    "granted": ("gated", {}, TOKEN),
    "private": ("private", {}, None),
    "not-mine": ("private", {}, OTHER_TOKEN),
    "mine": ("private", {}, TOKEN),
    "missing": ("missing", {}, TOKEN),
    "bad-token": (None, {}, "hf_expired"),
    "no-revision": (None, {}, None),
    "limited": ("rate_limit", {"retry_after": 0}, None),
    "failing": ("error", {"retry_after": 0}, None),
    "cut": ("cut", {"after_bytes": 100, "only": "*.json"}, None),
    "reset": ("reset", {"after_bytes": 100, "only": "*.json"}, None),
    "limited-twice": ("rate_limit", {"retry_after": 0, "times": 2, "scope": "files"}, None),
    "failing-once": ("error", {"retry_after": 0, "times": 1, "scope": "files"}, None),
    "cut-once": ("cut", {"after_bytes": 100, "times": 1, "only": "*.json"}, None),
}
_GATED_401 = ["GatedRepoError", 401, "Access to {} is restricted. You must have access to it and be authenticated"]
_GATED_403 = ["GatedRepoError", 403, "Access to {} is restricted and you are not in the authorized list."]
_HIDDEN_401 = ["RepositoryNotFoundError", 401, "Invalid username or password."]
_HIDDEN_404 = ["RepositoryNotFoundError", 404, "Repository not found"]
_BAD_TOKEN = ["HfHubHTTPError", 401, "Invalid credentials in Authorization header"]
_NO_REVISION = ["RevisionNotFoundError", 404, f"Invalid rev id: {_NO_COMMIT}"]
_LIMITED = ["HfHubHTTPError", 429, "We had to rate limit you."]
_FAILING = ["HfHubHTTPError", 500, "Internal Error (500)"]
_NOT_CACHED = ["LocalEntryNotFoundError", None, None]
_NOT_FOUND = ["DatasetNotFoundError", None, None]
_NO_FILE = ["FileNotFoundError", None, None]

# What each call raises first, then the errors that must be among its causes. Absent: the call succeeds.
_INFO = {
    "private": [_HIDDEN_401],
    "not-mine": [_HIDDEN_404],
    "missing": [_HIDDEN_404],
    "bad-token": [_BAD_TOKEN],
    "no-revision": [_NO_REVISION],
    "limited": [_LIMITED],
    "failing": [_FAILING],
}
_SNAPSHOT = _INFO | {
    "gated": [_GATED_401],
    "not-listed": [_GATED_403],
    "limited": [_NOT_CACHED, _LIMITED],
    "failing": [_NOT_CACHED, _FAILING],
    "cut": [["RemoteProtocolError", None, None]],
    "reset": [["ReadError", None, None]],
}
_DATASET = {
    "gated": [_NOT_FOUND],
    "not-listed": [_NOT_FOUND],
    "private": [_NOT_FOUND],
    "not-mine": [_NOT_FOUND],
    "missing": [_NOT_FOUND],
    "bad-token": [_BAD_TOKEN],
    "no-revision": [_NOT_FOUND, _NO_REVISION],
    "limited": [_NO_FILE, _NOT_CACHED, _LIMITED],
    "failing": [_NO_FILE, _NOT_CACHED, _FAILING],
}
_CALLS = {
    "model_info": ("models", _INFO, "HfApi(token=token).model_info(repo, revision=revision)"),
    "dataset_info": ("datasets", _INFO, "HfApi(token=token).dataset_info(repo, revision=revision)"),
    "snapshot_download": ("models", _SNAPSHOT, "snapshot_download(repo, revision=revision, token=token)"),
    "load_dataset": (
        "datasets",
        _DATASET,
        "datasets.load_dataset(repo, revision=revision or 'main', token=token)",
    ),
}


@pytest.mark.parametrize("call", _CALLS)
def test_each_fault_raises_what_the_libraries_document(
    call: str, hub: HubServer, client: Client, model: Path, tmp_path: Path
) -> None:
    kind, expected, source = _CALLS[call]
    for name, (fault, options, _) in _FAULTS.items():
        if kind == "models":
            hub.add_model(f"tester/{name}", model)
        else:
            hub.add_dataset(f"tester/{name}", _csv_dataset(tmp_path))
        if fault:
            hub.fault(f"tester/{name}", fault, **options)
    code = f"""
        from concurrent.futures import ThreadPoolExecutor
        from huggingface_hub import HfApi, snapshot_download
        import datasets
        datasets.disable_progress_bars()
        def one(case):
            name, token = case
            repo, revision = "tester/" + name, {_NO_COMMIT!r} if name == "no-revision" else None
            return name, attempt(lambda: {source})
        # Threads, because those that are retried sleep for most of their time.
        with ThreadPoolExecutor(len(given)) as pool:
            result.update(pool.map(one, given))
        """
    cases = [(name, token) for name, (_, _, token) in _FAULTS.items()]
    result = client.run(code, cases)
    for name in _FAULTS:
        errors = result[name]["errors"]
        wanted = expected.get(name, [])
        assert bool(errors) == bool(wanted), (name, errors)
        if not wanted:
            continue
        assert errors[0][:2] == wanted[0][:2], (name, errors)
        for error, status, message in wanted:
            repo = f"{kind.removesuffix('s')} tester/{name}"
            found = [said for other, code_, said in errors if (other, code_) == (error, status)]
            assert found, (name, errors)
            assert message is None or found[0].startswith(message.format(repo)), (name, found)
    if call == "snapshot_download":
        for name, wanted_statuses in {"limited-twice": [429, 429], "failing-once": [500]}.items():
            bad = [r.status for r in hub.requests if f"/tester/{name}/" in r.path and r.status >= 400]
            assert bad == wanted_statuses
        # Five retries, one second apart, then it gives up; a reset is not retried at all.
        assert 4 < result["cut"]["seconds"] < 15
        assert result["reset"]["seconds"] < 3
        granted = [r for r in hub.requests if "/tester/granted/" in r.path and r.path.endswith("model.safetensors")]
        assert {r.origin: r.authorization for r in granted} == {"hub": f"Bearer {TOKEN}", "cdn": None}


def test_a_broken_transfer_is_resumed(hub: HubServer, client: Client) -> None:
    """The client writes in pieces of 10 MiB and resumes at their ends, in the same process only."""
    content = random.Random(1).randbytes(12 * 1024 * 1024)
    hub.add_model("tester/large", {"model.safetensors": content, "large.txt": content})
    hub.fault("tester/large", "cut", after_bytes=11 * 1024 * 1024, times=1, only="model.safetensors")
    hub.fault("tester/large", "stall", after_bytes=11 * 1024 * 1024, times=1, only="large.txt", seconds=3)
    result = client.run(
        """
        import hashlib
        from huggingface_hub import hf_hub_download
        for name in ("model.safetensors", "large.txt"):
            path = hf_hub_download("tester/large", name)
            result[name] = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
        """,
        HF_HUB_DOWNLOAD_TIMEOUT="1",
    )
    assert len(set(result.values())) == 1
    rest = f"bytes={10 * 1024 * 1024}-"
    gets = [(r.origin, r.range, r.status) for r in hub.requests if r.method == "GET"]
    assert gets == [("cdn", None, 200), ("cdn", rest, 206), ("hub", None, 200), ("hub", rest, 206)]
    tree = hub.requests[0].path.split("/resolve/")[0]
    assert tree == "/tester/large"


def test_ranges_and_unknown_faults(hub: HubServer) -> None:
    hub.add_model("legacy", {"letters.txt": "abcdefghij"})
    for wanted, got in {"bytes=2-4": b"cde", "bytes=7-": b"hij", "bytes=-2": b"ij"}.items():
        request = urllib.request.Request(f"{hub.endpoint}/legacy/resolve/main/letters.txt", headers={"Range": wanted})
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert (answer.status, answer.read()) == (206, got)
    with pytest.raises(ValueError, match="no fault 'flood'"):
        hub.fault("legacy", "flood")


def test_run_as_a_program(tmp_path: Path) -> None:
    commit = tmp_path / "models" / "tester" / "by-hand" / "commits" / "0001"
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}")
    script = str(_REPOSITORY / "tests" / "hub" / "server.py")
    with subprocess.Popen([sys.executable, script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            endpoint = process.stdout.readline().strip()

            def ask(path: str, body: bytes | None = None) -> Any:
                with urllib.request.urlopen(f"{endpoint}{path}", data=body, timeout=5) as answer:
                    return json.load(answer)

            assert ask("/_hub/requests") == []
            sha = ask("/api/models/tester/by-hand")["sha"]
            assert ask("/_hub/head/models/tester/by-hand") == {"sha": sha}
            assert ask("/_hub/faults", b'{"repo": "tester/by-hand", "kind": "slow", "seconds": 0.5}')["times"] is None
            start = time.monotonic()
            ask("/api/models/tester/by-hand")
            assert time.monotonic() - start >= 0.5
            ask("/_hub/heal", b"{}")
            assert [request["status"] for request in ask("/_hub/requests")] == [200, 200]
        finally:
            process.terminate()
        assert process.wait(timeout=5) == 0


def test_tiny_rows_are_the_same_everywhere(tmp_path: Path) -> None:
    rows = tiny.tiny_reviews(50, seed=3)
    assert rows == tiny.tiny_reviews(50, seed=3) != tiny.tiny_reviews(50, seed=4)
    assert sorted(row["stars"] for row in rows) == sorted([1, 2, 3, 4, 5] * 10)
    assert all(abs(row["rating"] - row["stars"]) <= 0.4 for row in rows)
    assert {row["stars"] for row in tiny.tiny_reviews(20, stars=2)} == {1, 2}
    read = [json.loads(line) for line in tiny.write_jsonl(tmp_path / "a.jsonl", rows).read_text().splitlines()]
    assert read == rows
