"""`afina.site.registry` and `afina.site.pulled` against a small registry in this process: tokens, redirects, several machines, answers that are
wrong. A real registry, broken connections and full disks: tests/apptainer/test_pull.py."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.common import program
from tests.unit.conftest import sif_bytes

from afina.errors import InputError, SiteError
from afina.redact import redact
from afina.run.provenance.record import image_record
from afina.site.image import check_image, pull_image
from afina.site.pulled import pull, resolve, source_of
from afina.site.references import Reference
from afina.site.settings import load_site

DIGEST = f"sha256:{'0' * 64}"
SIF = "application/vnd.sylabs.sif.layer.v1.sif"
OCI = "application/vnd.oci.image.layer.v1.tar+gzip"
HERE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


@dataclass
class Store:
    """What the registry holds, by the path behind `/v2/`, and what it saw."""

    answers: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    token: str = ""
    elsewhere: str = ""
    ranges: bool = True
    host: str = ""

    def put(self, content: bytes, tag: str = "1", media_type: str = SIF) -> str:
        """An image of one layer; returns its digest."""
        blob = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.answers[f"g/x/blobs/{blob}"] = content
        return self.put_manifest({"layers": [{"mediaType": media_type, "digest": blob, "size": len(content)}]}, tag)

    def put_manifest(self, manifest: dict[str, Any], tag: str) -> str:
        raw = json.dumps(manifest).encode()
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        self.answers |= {f"g/x/manifests/{tag}": raw, f"g/x/manifests/{digest}": raw}
        return digest


class Handler(BaseHTTPRequestHandler):
    store: Store

    def do_GET(self) -> None:
        store, path = self.store, self.path.removeprefix("/v2/").removeprefix("/store/")
        given = self.headers.get("Authorization")
        store.requests.append((self.path, given))
        if self.path.startswith("/token"):
            ok = given == f"Basic {base64.b64encode(b'me:my-secret').decode()}"
            self.answer(200 if ok else 401, json.dumps({"token": store.token}).encode() if ok else b"")
        elif self.path.startswith("/v2/") and store.token and given != f"Bearer {store.token}":
            challenge = f'Bearer realm="http://{store.host}/token",service="s",scope="repository:g/x:pull"'
            self.answer(401, b"", ("WWW-Authenticate", challenge))
        elif path not in store.answers:
            self.answer(404, b"{}")
        elif store.elsewhere and "/blobs/" in path and self.path.startswith("/v2/"):
            self.answer(307, b"", ("Location", f"http://{store.elsewhere}/store/{path}"))
        elif store.ranges and (begin := self.headers.get("Range")):
            self.answer(206, store.answers[path][int(begin.removeprefix("bytes=").rstrip("-")) :])
        else:
            self.answer(200, store.answers[path])

    def answer(self, status: int, content: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("APPTAINER_NOHTTPS", "true")
    here = Store()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"store": here}))
    here.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield here
    server.shutdown()
    thread.join()
    server.server_close()


def pulled(store: Store, scratch: Path, tag: str = "1", **more: Any) -> Path:
    image = resolve(f"oras://{store.host}/g/x:{tag}", scratch / "cache", os.environ)
    pull(image, "apptainer", os.environ, **more)
    return image.path


@pytest.mark.parametrize(
    ("text", "host", "name", "tag", "digest"),
    [
        ("oras://r.example.org/a/b:1.2", "r.example.org", "a/b", "1.2", None),
        ("oras://localhost/b", "localhost", "b", "latest", None),
        (f"oras://r:5000/b:t@{DIGEST}", "r:5000", "b", "t", DIGEST),
        ("docker://python:3.12-slim", "registry-1.docker.io", "library/python", "3.12-slim", None),
        (f"docker://docker.io/a/b@{DIGEST}", "registry-1.docker.io", "a/b", "latest", DIGEST),
        ("docker://group/image", "registry-1.docker.io", "group/image", "latest", None),
    ],
)
def test_addresses(text: str, host: str, name: str, tag: str, digest: str | None) -> None:
    reference = Reference.parse(text)
    assert (reference.host, reference.name, reference.tag, reference.digest) == (host, name, tag, digest)


@pytest.mark.parametrize(
    "text",
    ["oras://", "oras://b", "oras://a/b", "oras://r.org/", "oras://r.org/a b", "oras://r.org/a:@x", "docker://", "oras://r.org/x@sha256:1"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(SiteError) as caught:
        Reference.parse(text)
    assert "oras://HOST/NAME:TAG" in caught.value.remedy


def test_a_password_in_an_address_is_refused_and_not_repeated(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    monkeypatch.setenv("AFINA_IMAGE", "oras://me:hunter22@r.example.org/x:1")
    with pytest.raises(SiteError, match="is not the address of an image") as caught:
        load_site()
    assert "hunter22" not in str(caught.value) and "apptainer registry login" in caught.value.remedy


def test_a_login_is_exchanged_for_a_token_and_not_sent_elsewhere(store: Store, scratch: Path) -> None:
    content = sif_bytes()
    store.put(content)
    store.token, store.elsewhere = "t0ken-of-the-registry", store.host.replace("127.0.0.1", "localhost")
    with pytest.raises(SiteError, match=r"wants a login for .* \(401\)"):
        pulled(store, scratch)
    configuration = Path(os.environ["HOME"]) / ".apptainer/docker-config.json"
    configuration.parent.mkdir(parents=True)
    auth = base64.b64encode(b"me:my-secret").decode()
    configuration.write_text(json.dumps({"auths": {store.host: {"auth": auth}}}))
    assert pulled(store, scratch).read_bytes() == content
    assert {header for path, header in store.requests if path.startswith("/store/")} == {None}
    written = b"".join(path.read_bytes() for path in scratch.rglob("*") if path.is_file())
    assert b"my-secret" not in written and auth.encode() not in written and b"t0ken" not in written


def test_a_helper_of_docker_knows_the_login(
    store: Store, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(sif_bytes())
    store.token = "t"
    bin = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    program(bin, "docker-credential-vault", f'read -r host; [ "$1 $host" = "get {store.host}" ] || exit 1; echo \'{{"Username": "me", "Secret": "my-secret"}}\'')  # fmt: skip
    (Path(os.environ["HOME"]) / ".docker").mkdir()
    (Path(os.environ["HOME"]) / ".docker/config.json").write_text(json.dumps({"credHelpers": {store.host: "vault"}}))
    assert pulled(store, scratch).is_file()


def test_of_several_machines_this_one_is_taken_and_the_index_names_the_image(store: Store, scratch: Path) -> None:
    mine = store.put(sif_bytes(), "mine")
    entries = [{"digest": DIGEST, "platform": {"os": "linux", "architecture": "s390x"}}]
    nothing = store.put_manifest({"manifests": entries}, "2")
    entries.append({"digest": mine, "platform": {"os": "linux", "architecture": HERE}})
    index = store.put_manifest({"manifests": entries}, "1")
    path = pulled(store, scratch)
    assert source_of(path) == (f"oras://{store.host}/g/x:1", index) and nothing != index
    with pytest.raises(SiteError, match=f"has no image for linux/{HERE}"):
        pulled(store, scratch, "2")


def test_the_other_kind_of_image_is_named(store: Store, scratch: Path) -> None:
    store.put(b"layer", media_type=OCI)
    with pytest.raises(SiteError, match="no Apptainer image is there") as caught:
        pulled(store, scratch)
    assert "docker://" in caught.value.remedy


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"layers": [{}]}', b"{}"])
def test_answers_that_are_none(store: Store, scratch: Path, answer: bytes) -> None:
    store.answers["g/x/manifests/1"] = answer
    with pytest.raises(SiteError) as caught:
        pulled(store, scratch)
    assert caught.value.remedy


def test_content_that_is_not_what_the_digest_says(store: Store, scratch: Path) -> None:
    content = sif_bytes()
    store.put(content)
    (blob,) = (name for name in store.answers if "/blobs/" in name)
    store.answers[blob] = content[:-1] + b"x"
    with pytest.raises(SiteError, match="what came is not what the digest says"):
        pulled(store, scratch)
    assert list((scratch / "cache/images").iterdir()) == [], "nothing of it stays"
    store.put(b"no image")
    with pytest.raises(SiteError, match="is not an Apptainer image"):
        pulled(store, scratch)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_damaged_beginning_is_read_again(store: Store, scratch: Path, ranges: bool) -> None:
    """What an earlier transfer left is not what it should be; and a registry that knows no ranges."""
    content, lines = sif_bytes(5000), []
    store.put(content)
    store.ranges = ranges
    image = resolve(f"oras://{store.host}/g/x:1", scratch / "cache", os.environ)
    image.folder.mkdir(parents=True)
    image.path.with_name(f".{image.path.name}.partial").write_bytes(b"?" * 3000)
    pull(image, "apptainer", os.environ, lines.append)
    assert image.path.read_bytes() == content and any("from the beginning" in line for line in lines) == ranges


def test_a_site_with_an_address(store: Store, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolved when the site is loaded, pulled by `check_image`, recorded; in the job the file's note tells where it is from."""
    address, content = f"oras://{store.host}/g/x:1", sif_bytes()
    digest = store.put(content)
    given = {**os.environ, "AFINA_SCRATCH": str(scratch), "AFINA_IMAGE": address}
    site = load_site(env=given)
    assert (site.image_address, site.image_digest, site.runtime) == (address, digest, "apptainer")
    assert site.image is not None and not site.image.exists() and site.image.is_relative_to(scratch / "cache/images")
    check_image(site)
    assert site.image.read_bytes() == content
    record = image_record(site)
    assert record == {
        "path": str(site.image), "address": address, "digest": digest, "size": len(content), "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip
    count = len(store.requests)
    in_job = load_site(env={**given, "AFINA_IMAGE": str(site.image), "APPTAINER_CONTAINER": "/x"}, job=True)
    assert (in_job.image, in_job.image_address, in_job.image_digest) == (site.image, address, digest)
    inside = load_site(env={**given, "APPTAINER_CONTAINER": "/x"})
    assert inside.image == site.image and inside.runtime == "none" and len(store.requests) == count, "nothing is asked"
    assert load_site(env={**given, "AFINA_RUNTIME": "none"}).image is None


def test_image_pull_wants_an_address(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    for given in (None, "/an/image.sif"):
        with pytest.raises(InputError, match="is not an address in a registry"):
            pull_image(given)


def test_an_address_with_a_token_is_redacted() -> None:
    assert "s3cretword" not in redact("oras://s3cretword@r.example.org/x")
