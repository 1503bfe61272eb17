"""The test hub against the real clients: each check runs in a fresh Python that knows the hub by its environment only.

Several checks share a process where the imports would dominate. Faults: `test_faults.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.common import ROOT
from tests.hub.client import Client, csv_dataset, labelled
from tests.hub.server import HubServer


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
    pinned = hub.add_dataset("tester/tiny-reviews", csv_dataset(tmp_path))
    hub.add_dataset("tester/tiny-reviews", csv_dataset(tmp_path, train=7))
    labels = {"label": tiny.star_names()}
    parquet = tiny.parquet_bytes(labelled(30, 5), labels)
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
    assert online["texts"] == [row["text"] for row in labelled(20, 1)]
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
    old = hub.add_dataset("tester/tiny-reviews", csv_dataset(tmp_path))
    new = hub.add_dataset("tester/tiny-reviews", csv_dataset(tmp_path, train=7))
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
    program = [sys.executable, "-m", "tests.hub.server", str(tmp_path)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
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
