"""A small Hugging Face Hub on the loopback interface, for tests that download for real.

It serves model and data set repositories, with several commits each, to huggingface_hub, transformers and datasets
through `HF_ENDPOINT`, records every request, and fails on demand (`HubServer.fault`). Large files (by extension, as on
the Hub) are redirected to a second origin that stands for the content network.

Standard library only, so that a shell test can run it with any Python:

    python tests/hub/server.py ROOT          # prints the endpoint, serves until it is terminated

ROOT holds `models/OWNER/NAME/commits/0001/FILES...`, `datasets/...` likewise; `commits/` are served in sorted order,
`main` is the last. A repository without an owner is `models/NAME/commits/...`. A running server is steered over HTTP:
`GET /_hub/requests`, `GET /_hub/head/models/OWNER/NAME` (its commit), `POST /_hub/faults` with
`{"repo": "OWNER/NAME", "kind": "rate_limit", ...}`, `POST /_hub/heal`.

Not covered: uploads, Xet (no answer carries an X-Xet header, so clients use plain HTTP), spaces, search, the data set
viewer, git. The client maps a bare 401 to RepositoryNotFoundError only over https, so a repository that is hidden says
`X-Error-Code: RepoNotFound` here, where the Hub may send a bare 401.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

__all__ = ["OTHER_TOKEN", "TOKEN", "Fault", "HubServer", "Request"]

TOKEN = "hf_test"  # may read everything
OTHER_TOKEN = "hf_other"  # a valid account that is on no access list

# Tracked by LFS on the Hub (its default .gitattributes): etag is the sha256, content comes from another origin.
_LFS = ("*.safetensors", "*.bin", "*.pt", "*.h5", "*.onnx", "*.parquet", "*.arrow", "*.gz", "*.zip", "*.zst", "*.model")
_API_VERBS = {"revision", "tree", "paths-info", "refs", "commits", "auth-check"}
_KINDS = {"gated", "private", "missing", "rate_limit", "error", "cut", "reset", "stall", "slow"}
_SHA_LENGTH = 40
_DATE = "2024-01-01T00:00:00.000Z"  # of every commit: answers are the same on every machine


@dataclass
class Fault:
    """What a repository does instead of answering.

    kind: gated       files: 401 without a token, 403 with one that is not on the list; metadata stays readable
          private     everything: 401 without a token, 404 with one that has no access
          missing     everything: 404, whoever asks
          rate_limit  429, with `Retry-After: retry_after` (1 unless told otherwise) and the Hub's rate limit headers
          error       `status`, 500 unless told otherwise; with `Retry-After` only if `retry_after` is given
          cut, reset  the connection is closed (FIN), or reset (RST), after `after_bytes` of an answer's content; a
                      shorter answer passes and does not count
          stall       like cut, but silent for `seconds` before it closes
          slow        every answer comes `seconds` late
    """

    repo: str
    kind: str
    times: int | None = None  # how often; None: always
    only: str = "*"  # pattern for the file names it concerns; metadata requests have the name ""
    scope: str = "all"  # "api", "files", "cdn" (the large files' origin; it knows only `error`) or "all"
    status: int = 500
    after_bytes: int = 0
    seconds: float = 0.0
    retry_after: int | None = None
    hits: int = 0

    def concerns(self, scope: str, name: str, length: int | None) -> bool:
        if self.times is not None and self.hits >= self.times:
            return False
        if length is not None and self.after_bytes >= length:
            return False
        return self.scope in ("all", scope) and fnmatch.fnmatchcase(name, self.only)


@dataclass(frozen=True)
class Request:
    """One request as it came, and the status it was answered with."""

    origin: str  # "hub" or "cdn"
    method: str
    path: str  # with the query
    status: int
    authorization: str | None
    range: str | None
    user_agent: str


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    oid: str  # git blob sha1
    sha256: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class _Repo:
    kind: str  # "models" or "datasets"
    id: str
    folder: Path

    def commits(self) -> dict[str, Path]:
        """{sha: folder}, oldest first. The sha follows from the name and content of all commits up to it."""
        chain = hashlib.sha1(f"{self.kind}/{self.id}".encode())
        found = {}
        for folder in sorted(path for path in (self.folder / "commits").iterdir() if path.is_dir()):
            for name, file in _files(folder).items():
                chain.update(f"{name}\0{file.sha256}\0".encode())
            chain.update(folder.name.encode())
            found[chain.hexdigest()] = folder
        return found


@lru_cache(maxsize=256)
def _files(folder: Path) -> dict[str, _File]:
    """Files of one commit. Cached: a commit does not change."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = _File(
            path=path,
            size=len(content),
            oid=hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            sha256=hashlib.sha256(content).hexdigest(),
            lfs=any(fnmatch.fnmatch(path.name, pattern) for pattern in _LFS),
        )
    return found


class _Answer(Exception):
    """Ends the handling of a request: raised wherever the answer is known."""

    def __init__(self, status: int, payload: Any = None, headers: Mapping[str, str] | None = None):
        super().__init__(status)
        self.status, self.payload, self.headers = status, payload, dict(headers or {})


def _refusal(status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> _Answer:
    named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return _Answer(status, {"error": message}, named | dict(headers or {}))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: HubServer, origin: str, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
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

    def __init__(self, root: Path, port: int = 0, page_size: int = 1000):
        self.root = Path(root)
        self.page_size = page_size  # of tree listings; the Hub's is 1000
        self.tokens = {TOKEN, OTHER_TOKEN}
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self._faults: list[Fault] = []
        self._moved: dict[str, str] = {}
        self._lock = threading.Lock()
        self._port = port

    def __enter__(self) -> HubServer:
        self._hub = _Server(self, "hub", self._port)
        self._cdn = _Server(self, "cdn")
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
        return list(_Repo(kind, repo_id, self.root / kind / repo_id).commits())[-1]

    def move(self, old_id: str, new_id: str) -> None:
        """Requests for `old_id` are redirected to `new_id`, as for the Hub's old names without an owner."""
        self._moved[old_id] = new_id

    def fault(self, repo: str, kind: str, **options: Any) -> Fault:
        """From now on `repo` fails in the way of `kind`; see `Fault` for the options."""
        if kind not in _KINDS:
            raise ValueError(f"no fault {kind!r}; there are {', '.join(sorted(_KINDS))}")
        if kind == "rate_limit":
            options.setdefault("retry_after", 1)
        fault = Fault(repo, kind, **options)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self, repo: str | None = None) -> None:
        with self._lock:
            self._faults = [fault for fault in self._faults if repo is not None and fault.repo != repo]

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

    def _find(self, kind: str, segments: list[str]) -> tuple[_Repo | None, str, list[str]]:
        """The repository that a path begins with, its name as it was asked for, and the rest of the path."""
        named = 1 if len(segments) < 2 or segments[1] in _API_VERBS | {"resolve"} else 2
        repo_id = "/".join(segments[:named])
        folder = self.root / kind / repo_id
        repo = _Repo(kind, repo_id, folder) if (folder / "commits").is_dir() else None
        return repo, repo_id, segments[named:]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept in `HubServer.requests`, standard error stays clean."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        segments = [unquote(part) for part in url.path.strip("/").split("/")]
        query = parse_qs(url.query)
        try:
            if segments[0] == "_hub":
                self._steer(segments[1:], body)
            elif self.server.origin == "cdn":
                self._content(segments)
            elif segments[0] == "api" and len(segments) > 2 and segments[1] in ("models", "datasets"):
                self._api(segments[1], segments[2:], query, body)
            elif segments[0] == "datasets":
                self._resolve("datasets", segments[1:])
            else:
                self._resolve("models", segments)
        except _Answer as answer:
            self._reply(answer)
        except ConnectionError:
            raise
        except Exception as error:
            self.server.hub.errors.append(f"{self.command} {self.path}: {error!r}")
            self._reply(_Answer(500, {"error": f"the test hub failed by itself: {error!r}"}))

    # -- answers -------------------------------------------------------------------------------------------------

    def _record(self, status: int) -> None:
        if self.path.startswith("/_hub/"):
            return
        hub = self.server.hub
        with hub._lock:
            hub.requests.append(
                Request(
                    origin=self.server.origin,
                    method=self.command,
                    path=self.path,
                    status=status,
                    authorization=self.headers.get("Authorization"),
                    range=self.headers.get("Range"),
                    user_agent=self.headers.get("User-Agent", ""),
                )
            )

    def _reply(self, answer: _Answer) -> None:
        self._record(answer.status)
        body = b"" if answer.payload is None else json.dumps(answer.payload).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        for header, value in answer.headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, repo: _Repo, name: str, file: _File, headers: Mapping[str, str]) -> None:
        """The file, or the part that `Range` asks for, unless a fault ends it early."""
        content = file.path.read_bytes()
        start, stop = 0, len(content)
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(content) - int(last))
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
            if start >= len(content):
                raise _Answer(416, None, {"Content-Range": f"bytes */{len(content)}"})
        self._record(206 if wanted else 200)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.hub._strike(repo.id, "files", name, {"cut", "reset", "stall"}, length=stop - start)
        if cut is None:
            self.wfile.write(content[start:stop])
            return
        self.wfile.write(content[start : start + cut.after_bytes])
        self.wfile.flush()
        # Time for the client to take what was sent: a reset discards what it has not read yet.
        time.sleep(cut.seconds if cut.kind == "stall" else 0.05)
        self.close_connection = True
        if cut.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    # -- who may, and what goes wrong ------------------------------------------------------------------------------

    def _enter(self, kind: str, segments: list[str], scope: str, name: str = "") -> tuple[_Repo, list[str]]:
        """Find the repository and let its faults have their say."""
        hub = self.server.hub
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        if token is not None and token not in hub.tokens:
            raise _refusal(401, None, "Invalid credentials in Authorization header")
        repo, asked, rest = hub._find(kind, segments)
        if asked in hub._moved:
            raise _Answer(307, None, {"Location": self.path.replace(asked, hub._moved[asked], 1)})
        slow = hub._strike(asked, scope, name, {"slow"})
        if slow is not None:
            time.sleep(slow.seconds)
        if hub._strike(asked, scope, name, {"missing"}):
            raise _refusal(404, "RepoNotFound", "Repository not found")
        if token != TOKEN and (repo is None or hub._strike(asked, scope, name, {"private"})):
            if token is None:
                raise _refusal(401, "RepoNotFound", "Invalid username or password.")
            raise _refusal(404, "RepoNotFound", "Repository not found")
        if repo is None:
            raise _refusal(404, "RepoNotFound", "Repository not found")
        if limit := hub._strike(asked, scope, name, {"rate_limit"}):
            raise _refusal(429, None, "We had to rate limit you. Retry later or authenticate.", _patience(limit))
        if broken := hub._strike(asked, scope, name, {"error"}):
            raise _refusal(broken.status, None, f"Internal Error ({broken.status})", _patience(broken))
        if scope == "files" and token != TOKEN and hub._strike(asked, scope, name, {"gated"}):
            restricted = f"Access to {kind.removesuffix('s')} {asked} is restricted"
            if token is None:
                detail = "You must have access to it and be authenticated to access it. Please log in."
                raise _refusal(401, "GatedRepo", f"{restricted}. {detail}")
            detail = f"and you are not in the authorized list. Visit the page of {asked} to ask for access."
            raise _refusal(403, "GatedRepo", f"{restricted} {detail}")
        return repo, rest

    def _at(self, repo: _Repo, revision: str) -> tuple[str, dict[str, _File]]:
        """The commit that a branch or a (shortened) sha names, and its files."""
        commits = repo.commits()
        shas = list(commits)
        if revision == "main":
            return shas[-1], _files(commits[shas[-1]])
        for sha in shas:
            if len(revision) >= 7 and sha.startswith(revision):
                return sha, _files(commits[sha])
        raise _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # -- the interface ---------------------------------------------------------------------------------------------

    def _api(self, kind: str, segments: list[str], query: dict[str, list[str]], body: bytes) -> None:
        hub = self.server.hub
        if segments[-1] == "auth-check":
            repo, _ = self._enter(kind, segments, "files")
            raise _Answer(200, {})
        repo, rest = self._enter(kind, segments, "api")
        verb, argument = (rest[0], rest[1:]) if rest else ("revision", ["main"])
        if verb == "revision":
            raise _Answer(200, self._info(repo, *self._at(repo, argument[0]), blobs="blobs" in query))
        if verb == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": hub.head(kind, repo.id)}
            raise _Answer(200, {"branches": [branch], "tags": [], "converts": []})
        if verb == "commits":
            listed = [
                {"id": sha, "title": folder.name, "message": "", "date": _DATE, "authors": []}
                for sha, folder in reversed(repo.commits().items())
            ]
            raise _Answer(200, listed)
        if verb == "tree":
            _, files = self._at(repo, argument[0])
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = _entries(files, "/".join(argument[1:]), recursive)
            first = int(query.get("cursor", ["0"])[0])
            headers = {}
            if first + hub.page_size < len(entries):
                base = f"{self.server.url}{urlsplit(self.path).path}?recursive={recursive}"
                headers["Link"] = f'<{base}&cursor={first + hub.page_size}>; rel="next"'
            raise _Answer(200, entries[first : first + hub.page_size], headers)
        if verb == "paths-info" and self.command == "POST":
            _, files = self._at(repo, argument[0])
            if self.headers.get("Content-Type", "").startswith("application/json"):
                asked = json.loads(body)["paths"]
            else:
                asked = parse_qs(body.decode()).get("paths", [])
            everything = {entry["path"]: entry for entry in _entries(files, "", recursive=True)}
            raise _Answer(200, [everything[path] for path in asked if path in everything])
        raise _refusal(404, None, f"the test hub has no {verb}")

    def _info(self, repo: _Repo, sha: str, files: dict[str, _File], blobs: bool) -> dict[str, Any]:
        hub = self.server.hub
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in files]
        if blobs:
            for sibling, file in zip(siblings, files.values(), strict=True):
                sibling |= {"size": file.size, "blobId": file.oid}
                if file.lfs:
                    sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
        kinds = {fault.kind for fault in hub._faults if fault.repo == repo.id}
        return {
            "_id": sha[:24],
            "id": repo.id,
            "author": repo.id.partition("/")[0] if "/" in repo.id else None,
            "sha": sha,
            "private": "private" in kinds,
            "gated": "manual" if "gated" in kinds else False,
            "disabled": False,
            "createdAt": _DATE,
            "lastModified": _DATE,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        } | ({"modelId": repo.id} if repo.kind == "models" else {})

    def _resolve(self, kind: str, segments: list[str]) -> None:
        if "resolve" not in segments[1:3]:
            raise _refusal(404, None, "the test hub has no such page")
        verb = segments.index("resolve", 1)
        revision, name = segments[verb + 1], "/".join(segments[verb + 2 :])
        repo, _ = self._enter(kind, segments, "files", name)
        sha, files = self._at(repo, revision)
        if name not in files:
            raise _refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        file = files[name]
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": sha}
        if file.lfs:
            place = quote(f"{kind}/{repo.id}/{sha}/{name}")
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
            raise _Answer(302, None, headers | {"Location": f"{self.server.hub._cdn.url}/{place}"})
        self._send_file(repo, name, file, headers)

    def _content(self, segments: list[str]) -> None:
        """What a signed address of the content network serves. It knows no tokens."""
        hub = self.server.hub
        place = next((i for i, part in enumerate(segments) if len(part) == _SHA_LENGTH), 0)
        repo, asked, _ = hub._find(segments[0], [*segments[1:place], "resolve"])
        if repo is None:
            raise _Answer(404, {"error": f"no content for {asked}"})
        name = "/".join(segments[place + 1 :])
        _, files = self._at(repo, segments[place])
        if broken := hub._strike(repo.id, "cdn", name, {"error"}):
            raise _Answer(broken.status, {"error": "content network"})
        self._send_file(repo, name, files[name], {"ETag": f'"{files[name].sha256}"'})

    def _steer(self, segments: list[str], body: bytes) -> None:
        hub = self.server.hub
        if segments == ["requests"]:
            raise _Answer(200, [asdict(request) for request in hub.requests])
        if segments[:1] == ["head"] and len(segments) > 2:
            raise _Answer(200, {"sha": hub.head(segments[1], "/".join(segments[2:]))})
        if self.command == "POST" and segments == ["faults"]:
            try:
                raise _Answer(200, asdict(hub.fault(**json.loads(body))))
            except (TypeError, ValueError) as error:
                raise _Answer(400, {"error": str(error)}) from error
        if self.command == "POST" and segments == ["heal"]:
            hub.heal()
            raise _Answer(200, {})
        raise _Answer(404, {"error": f"unknown: {'/'.join(segments)}"})


def _patience(fault: Fault) -> dict[str, str]:
    """The headers by which the Hub says how long to wait."""
    if fault.retry_after is None:
        return {}
    headers = {"Retry-After": str(fault.retry_after)}
    if fault.kind == "rate_limit":
        headers["RateLimit"] = f'"api";r=0;t={fault.retry_after}'
        headers["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'
    return headers


def _entries(files: Mapping[str, _File], below: str, recursive: bool) -> list[dict[str, Any]]:
    """A tree listing: the files under `below`, and the folders that hold them."""
    listed: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        if below and name != below and not name.startswith(f"{below}/"):
            continue
        parents = [str(path) for path in PurePosixPath(name).parents if str(path) != "."]
        for folder in reversed(parents):
            if not below or folder.startswith(f"{below}/"):
                oid = hashlib.sha1(folder.encode()).hexdigest()
                listed[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        listed[name] = {"type": "file", "oid": file.oid, "size": file.size, "path": name}
        if file.lfs:
            listed[name]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    if below and not listed:
        raise _refusal(404, "EntryNotFound", f"{below} does not exist")
    depth = below.count("/") + 1 if below else 0
    return [entry for path, entry in listed.items() if recursive or path == below or path.count("/") == depth]


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve ROOT as a Hugging Face Hub on the loopback interface.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with HubServer(arguments.root, arguments.port) as hub:
        print(hub.endpoint, flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
