"""A small Hugging Face Hub on the loopback interface, for tests that download for real.

It serves model and data set repositories, with several commits each, to huggingface_hub, transformers and datasets
through `HF_ENDPOINT`, records every request, and fails on demand (`HubServer.fault`). Large files (by extension, as on
the Hub) are redirected to a second origin that stands for the content network.

Its folder holds `models/OWNER/NAME/commits/0001/FILES...`, `datasets/...` likewise; `commits/` are served in sorted order,
`main` is the last. A repository without an owner is `models/NAME/commits/...`.

Not covered: uploads, Xet (no answer carries an X-Xet header, so clients use plain HTTP), spaces, search, the data set
viewer, git. The client maps a bare 401 to RepositoryNotFoundError only over https, so a repository that is hidden says
`X-Error-Code: RepoNotFound` here, where the Hub may send a bare 401.
"""

from __future__ import annotations

import shutil
import socket
import sys
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.hub.faults import KINDS, Fault
from tests.hub.handler import API_VERBS, OTHER_TOKEN, TOKEN, Handler, Request
from tests.hub.repository import Repo

__all__ = ["OTHER_TOKEN", "TOKEN", "Fault", "HubServer", "Request"]


class Origin(ThreadingHTTPServer):
    """One address of the hub: the interface, or the content network."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: HubServer, origin: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.origin = hub, origin
        self.open_connections: set[socket.socket] = set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open_connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open_connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # A client that goes away in the middle is what several tests are about.
        if not isinstance(error, (ConnectionError, TimeoutError)):
            self.hub.errors.append(repr(error))

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        # Kept-alive connections would go on being served by their threads: a stopped hub must not answer.
        for connection in list(self.open_connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class HubServer:
    """`with HubServer(tmp_path / "hub") as hub:` serves what `root` holds and what `add_model`, `add_dataset` add.

    Leaving the block stops it, and raises if the server itself made a mistake (`errors`).
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self.tokens = {TOKEN, OTHER_TOKEN}
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self._faults: list[Fault] = []
        self._moved: dict[str, str] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> HubServer:
        self._hub = Origin(self, "hub")
        self._cdn = Origin(self, "cdn")
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hub.stop()
        self._cdn.stop()
        if self.errors and error is None:
            raise AssertionError(f"the test hub failed by itself: {self.errors}")

    @property
    def endpoint(self) -> str:
        return self._hub.url

    def env(self, hf_home: Path) -> dict[str, str]:
        """Variables that point a process at this hub and at nothing else. Merge them into its environment.

        `HF_UPDATE_DOWNLOAD_COUNTS=0`: `datasets` otherwise sends a HEAD to an S3 bucket at each load.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(hf_home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add_model(self, repo_id: str, files: Path | Mapping[str, bytes | str | Path]) -> str:
        """Commit a folder, or {name: content or path}, as the whole content of `main`; return the commit's sha."""
        return self._commit("models", repo_id, files)

    def add_dataset(self, repo_id: str, files: Path | Mapping[str, bytes | str | Path]) -> str:
        return self._commit("datasets", repo_id, files)

    def _commit(self, kind: str, repo_id: str, files: Path | Mapping[str, bytes | str | Path]) -> str:
        commits = self.root / kind / repo_id / "commits"
        number = len(list(commits.iterdir())) + 1 if commits.is_dir() else 1
        # Filled aside and renamed, because a request may arrive meanwhile.
        aside = self.root / "incoming"
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(files, Mapping):
            for name, content in files.items():
                target = aside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, target)
                else:
                    target.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            shutil.copytree(files, aside)
        commits.mkdir(parents=True, exist_ok=True)
        aside.rename(commits / f"{number:04d}")
        return self.head(kind, repo_id)

    def head(self, kind: str, repo_id: str) -> str:
        return list(Repo(kind, repo_id, self.root / kind / repo_id).commits())[-1]

    def move(self, old_id: str, new_id: str) -> None:
        """Requests for `old_id` are redirected to `new_id`, as for the Hub's old names without an owner."""
        self._moved[old_id] = new_id

    def fault(self, repo: str, kind: str, **options: Any) -> Fault:
        """From now on `repo` fails in the way of `kind`; see `Fault` for the options."""
        if kind not in KINDS:
            raise ValueError(f"no fault {kind!r}; there are {', '.join(sorted(KINDS))}")
        if kind == "rate_limit":
            options.setdefault("retry_after", 1)
        fault = Fault(repo, kind, **options)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def clear(self) -> None:
        """Forget the recorded requests."""
        with self._lock:
            self.requests.clear()

    def _strike(self, repo: str, scope: str, name: str, kinds: set[str], length: int | None = None) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.repo == repo and fault.kind in kinds and fault.concerns(scope, name, length):
                    fault.hits += 1
                    return fault
        return None

    def _find(self, kind: str, segments: list[str]) -> tuple[Repo | None, str, list[str]]:
        """The repository that a path begins with, its name as it was asked for, and the rest of the path."""
        named = 1 if len(segments) < 2 or segments[1] in API_VERBS | {"resolve"} else 2
        repo_id = "/".join(segments[:named])
        folder = self.root / kind / repo_id
        repo = Repo(kind, repo_id, folder) if (folder / "commits").is_dir() else None
        return repo, repo_id, segments[named:]
