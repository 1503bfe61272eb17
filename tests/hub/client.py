"""A client of the test hub: a fresh Python that knows the hub by its environment only, and counts whom else it asks.

Network contacts are counted with an audit hook, so "nothing else was reached" includes name look-ups.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tests import tiny
from tests.hub.server import HubServer

__all__ = ["Client", "csv_dataset", "labelled"]

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


def labelled(n: int, seed: int) -> list[dict[str, Any]]:
    return [{"text": row["text"], "label": row["stars"] - 1} for row in tiny.tiny_reviews(n, seed)]


def csv_dataset(folder: Path, train: int = 40) -> dict[str, Path | str]:
    files = {"train": train, "test": 20}
    for seed, (split, rows) in enumerate(files.items()):
        tiny.write_csv(folder / f"{split}.csv", labelled(rows, seed))
    card = tiny.dataset_card(
        {"reviews": {"train": "train.csv", "test": "data/test.csv"}}, {"label": tiny.star_names()}, {"text": "string"}
    )
    return {"README.md": card, "train.csv": folder / "train.csv", "data/test.csv": folder / "test.csv"}
