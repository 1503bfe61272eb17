"""Each fault of the test hub, as the real clients report it; the prepare stage relies on these errors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.hub.client import Client, csv_dataset
from tests.hub.server import OTHER_TOKEN, TOKEN, HubServer

_NO_COMMIT = "a" * 40

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
            hub.add_dataset(f"tester/{name}", csv_dataset(tmp_path))
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
