"""The Hub's interface over HTTP: one request, one answer, or the fault that stands in its place."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub.faults import Answer, patience, refusal
from tests.hub.repository import File, Repo, entries, files_of

if TYPE_CHECKING:
    from tests.hub.server import Origin

__all__ = ["API_VERBS", "OTHER_TOKEN", "TOKEN", "Handler", "Request"]

TOKEN = "hf_test"  # may read everything
OTHER_TOKEN = "hf_other"  # a valid account that is on no access list

API_VERBS = {"revision", "tree", "paths-info", "refs", "auth-check"}
_SHA_LENGTH = 40
_DATE = "2024-01-01T00:00:00.000Z"  # of every commit: answers are the same on every machine


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


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Origin

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
            if self.server.origin == "cdn":
                self._content(segments)
            elif segments[0] == "api" and len(segments) > 2 and segments[1] in ("models", "datasets"):
                self._api(segments[1], segments[2:], query, body)
            elif segments[0] == "datasets":
                self._resolve("datasets", segments[1:])
            else:
                self._resolve("models", segments)
        except Answer as answer:
            self._reply(answer)
        except ConnectionError:
            raise
        except Exception as error:
            self.server.hub.errors.append(f"{self.command} {self.path}: {error!r}")
            self._reply(Answer(500, {"error": f"the test hub failed by itself: {error!r}"}))

    # -- answers -------------------------------------------------------------------------------------------------

    def _record(self, status: int) -> None:
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

    def _reply(self, answer: Answer) -> None:
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

    def _send_file(self, repo: Repo, name: str, file: File, headers: Mapping[str, str]) -> None:
        """The file, or the part that `Range` asks for, unless a fault ends it early."""
        content = file.path.read_bytes()
        start, stop = 0, len(content)
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(content)) if last else len(content)
            if start >= len(content):
                raise Answer(416, None, {"Content-Range": f"bytes */{len(content)}"})
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

    def _enter(self, kind: str, segments: list[str], scope: str, name: str = "") -> tuple[Repo, list[str]]:
        """Find the repository and let its faults have their say."""
        hub = self.server.hub
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        if token is not None and token not in hub.tokens:
            raise refusal(401, None, "Invalid credentials in Authorization header")
        repo, asked, rest = hub._find(kind, segments)
        if asked in hub._moved:
            raise Answer(307, None, {"Location": self.path.replace(asked, hub._moved[asked], 1)})
        if hub._strike(asked, scope, name, {"missing"}):
            raise refusal(404, "RepoNotFound", "Repository not found")
        if token != TOKEN and (repo is None or hub._strike(asked, scope, name, {"private"})):
            if token is None:
                raise refusal(401, "RepoNotFound", "Invalid username or password.")
            raise refusal(404, "RepoNotFound", "Repository not found")
        if repo is None:
            raise refusal(404, "RepoNotFound", "Repository not found")
        if limit := hub._strike(asked, scope, name, {"rate_limit"}):
            raise refusal(429, None, "We had to rate limit you. Retry later or authenticate.", patience(limit))
        if broken := hub._strike(asked, scope, name, {"error"}):
            raise refusal(broken.status, None, f"Internal Error ({broken.status})", patience(broken))
        if scope == "files" and token != TOKEN and hub._strike(asked, scope, name, {"gated"}):
            restricted = f"Access to {kind.removesuffix('s')} {asked} is restricted"
            if token is None:
                detail = "You must have access to it and be authenticated to access it. Please log in."
                raise refusal(401, "GatedRepo", f"{restricted}. {detail}")
            detail = f"and you are not in the authorized list. Visit the page of {asked} to ask for access."
            raise refusal(403, "GatedRepo", f"{restricted} {detail}")
        return repo, rest

    def _at(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        """The commit that a branch or a (shortened) sha names, and its files."""
        commits = repo.commits()
        shas = list(commits)
        if revision == "main":
            return shas[-1], files_of(commits[shas[-1]])
        for sha in shas:
            if len(revision) >= 7 and sha.startswith(revision):
                return sha, files_of(commits[sha])
        raise refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # -- the interface ---------------------------------------------------------------------------------------------

    def _api(self, kind: str, segments: list[str], query: dict[str, list[str]], body: bytes) -> None:
        hub = self.server.hub
        if segments[-1] == "auth-check":
            repo, _ = self._enter(kind, segments, "files")
            raise Answer(200, {})
        repo, rest = self._enter(kind, segments, "api")
        verb, argument = (rest[0], rest[1:]) if rest else ("revision", ["main"])
        if verb == "revision":
            raise Answer(200, self._info(repo, *self._at(repo, argument[0]), blobs="blobs" in query))
        if verb == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": hub.head(kind, repo.id)}
            raise Answer(200, {"branches": [branch], "tags": [], "converts": []})
        if verb == "tree":
            _, files = self._at(repo, argument[0])
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            below = "/".join(argument[1:])
            listed = entries(files, below, recursive)
            if below and not listed:
                raise refusal(404, "EntryNotFound", f"{below} does not exist")
            raise Answer(200, listed)
        if verb == "paths-info" and self.command == "POST":
            _, files = self._at(repo, argument[0])
            if self.headers.get("Content-Type", "").startswith("application/json"):
                asked = json.loads(body)["paths"]
            else:
                asked = parse_qs(body.decode()).get("paths", [])
            everything = {entry["path"]: entry for entry in entries(files, "", recursive=True)}
            raise Answer(200, [everything[path] for path in asked if path in everything])
        raise refusal(404, None, f"the test hub has no {verb}")

    def _info(self, repo: Repo, sha: str, files: dict[str, File], blobs: bool) -> dict[str, Any]:
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
            raise refusal(404, None, "the test hub has no such page")
        verb = segments.index("resolve", 1)
        revision, name = segments[verb + 1], "/".join(segments[verb + 2 :])
        repo, _ = self._enter(kind, segments, "files", name)
        sha, files = self._at(repo, revision)
        if name not in files:
            raise refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        file = files[name]
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": sha}
        if file.lfs:
            place = quote(f"{kind}/{repo.id}/{sha}/{name}")
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
            raise Answer(302, None, headers | {"Location": f"{self.server.hub._cdn.url}/{place}"})
        self._send_file(repo, name, file, headers)

    def _content(self, segments: list[str]) -> None:
        """What a signed address of the content network serves. It knows no tokens."""
        hub = self.server.hub
        place = next((i for i, part in enumerate(segments) if len(part) == _SHA_LENGTH), 0)
        repo, asked, _ = hub._find(segments[0], [*segments[1:place], "resolve"])
        if repo is None:
            raise Answer(404, {"error": f"no content for {asked}"})
        name = "/".join(segments[place + 1 :])
        _, files = self._at(repo, segments[place])
        self._send_file(repo, name, files[name], {"ETag": f'"{files[name].sha256}"'})
