"""A transfer that breaks off, with the real client, as the message of a prefetch promises. The other answers: test_prepare_hub.py."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from tests.hub.server import HubServer


def test_a_broken_transfer_is_resumed(hub: HubServer, tmp_path: Path) -> None:
    """The client writes in pieces of 10 MiB and resumes at their ends, in the same process only."""
    content = random.Random(1).randbytes(12 * 1024 * 1024)
    hub.add_model("tester/large", {"model.safetensors": content, "large.txt": content})
    hub.fault("tester/large", "cut", after_bytes=11 * 1024 * 1024, times=1, only="model.safetensors")
    hub.fault("tester/large", "stall", after_bytes=11 * 1024 * 1024, times=1, only="large.txt", seconds=3)
    code = """
from huggingface_hub import hf_hub_download
for name in ("model.safetensors", "large.txt"):
    print(hf_hub_download("tester/large", name))
"""
    env = {**os.environ, **hub.env(tmp_path / "home"), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=90)
    assert [Path(file).read_bytes() for file in done.stdout.splitlines()] == [content] * 2
    rest = f"bytes={10 * 1024 * 1024}-"
    gets = [(r.origin, r.range, r.status) for r in hub.requests if r.method == "GET"]
    assert gets == [("cdn", None, 200), ("cdn", rest, 206), ("hub", None, 200), ("hub", rest, 206)]
    tree = hub.requests[0].path.split("/resolve/")[0]
    assert tree == "/tester/large"
