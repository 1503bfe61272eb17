"""OCI registries: what a name points to there, and the bytes behind it (OCI distribution specification 1.1).

Read with the standard library, so that a login node needs nothing: `apptainer pull` cannot name the digest behind a tag, and begins a broken transfer
from zero. Logins are those of `apptainer registry login` and of Docker, helpers included; they go into one request header and nowhere else.
`APPTAINER_NOHTTPS`, the variables of proxies and `SSL_CERT_FILE` count here as they do for Apptainer.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import platform
import re
import ssl
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from afina.errors import SiteError
from afina.files import read_json
from afina.redact import redact
from afina.site.references import DOCKER_HUB, DOCKER_HUB_NAMES, UNREACHABLE, Reference

__all__ = ["ARCHITECTURES", "SIF_LAYER", "Layer", "Manifest", "Registry", "read_block", "without_https"]

SIF_LAYER = "application/vnd.sylabs.sif.layer.v1.sif"
_INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
#: Seconds without a byte after which a connection counts as lost.
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Layer:
    """A blob of an image: its media type, digest and size in bytes."""

    media_type: str
    digest: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """An image as its registry lists it. `digest` is that of the name, which may be an index of several machines."""

    digest: str
    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)

    @property
    def sif(self) -> Layer | None:
        """The Apptainer image, where this is one."""
        return next((layer for layer in self.layers if layer.media_type == SIF_LAYER), None)


def without_https(env: Mapping[str, str]) -> bool:
    """`APPTAINER_NOHTTPS`, as Apptainer reads it."""
    values = (env.get(f"{runtime}_NOHTTPS", "") for runtime in ("APPTAINER", "SINGULARITY"))
    return any(value.lower() in ("1", "t", "true") for value in values)


@dataclass
class Registry:
    """A repository of one registry. `env` holds HOME, logins, proxies."""

    reference: Reference
    env: Mapping[str, str]
    _authorization: str | None = field(default=None, repr=False)

    def manifest(self) -> Manifest:
        """The manifest that the reference points to now; with a digest, that one.

        Raises:
            SiteError: there is none, the login does not open it, it is of another kind; `UNREACHABLE` where nothing answers.
        """
        reference = self.reference
        digest, value = self._manifest(reference.digest or reference.tag)
        if reference.digest not in (None, digest):
            raise SiteError(f"{reference.pinned}: the registry answers with {digest}", "ask who runs it: it is damaged")
        if value.get("mediaType") in _INDEXES or "manifests" in value:
            value = self._manifest(_of_this_machine(value, reference))[1]
        try:
            layers = tuple(Layer(str(e["mediaType"]), str(e["digest"]), int(e["size"])) for e in value["layers"])
        except (KeyError, TypeError, ValueError):
            raise SiteError(
                f"{self._shown}: an unknown kind of manifest", "push it again: container/build.sh --push"
            ) from None
        manifest = Manifest(digest, layers)
        if (manifest.sif is not None) != (reference.scheme == "oras"):
            there, scheme = ("an Apptainer image", "oras") if manifest.sif else ("no Apptainer image", "docker")
            raise SiteError(f"{self._shown}: {there} is there", f"write {scheme}:// in AFINA_IMAGE")
        return manifest

    def blob(self, digest: str, offset: int = 0) -> http.client.HTTPResponse:
        """The bytes of a blob from `offset` on; status 200 instead of 206 means that they begin at 0.

        Raises:
            SiteError: as `manifest`.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        return self._open(f"blobs/{digest}", headers)

    def put_blob(self, layer: Layer, content: IO[bytes]) -> bool:
        """Upload a blob unless the registry has it; returns whether it was uploaded.

        Raises:
            SiteError: as `manifest`.
        """
        with contextlib.suppress(SiteError), self._open(f"blobs/{layer.digest}", {}, "HEAD"):
            return False
        with self._open("blobs/uploads/", {"Content-Length": "0"}, "POST") as answer:
            place = urllib.parse.urljoin(answer.url, answer.headers["Location"])
        url = f"{place}{'&' if '?' in place else '?'}{urllib.parse.urlencode({'digest': layer.digest})}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(layer.size)}
        with self._open(url, headers, "PUT", content):
            return True

    def put_manifest(self, raw: bytes, media_type: str) -> None:
        """Let the tag point to this manifest, whose blobs are there.

        Raises:
            SiteError: as `manifest`.
        """
        with self._open(f"manifests/{self.reference.tag}", {"Content-Type": media_type}, "PUT", raw):
            pass

    @property
    def _shown(self) -> str:
        reference = self.reference
        return f"{reference.scheme}://{reference.host}/{reference.name}:{reference.tag}"

    def _manifest(self, name: str) -> tuple[str, dict[str, Any]]:
        try:
            with self._open(f"manifests/{name}", {"Accept": ", ".join((*_INDEXES, *_MANIFESTS))}) as answer:
                raw = answer.read()
            value = json.loads(raw)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise SiteError(
                f"{self._shown}: {self.reference.host} does not answer as a registry", "correct the address"
            )
        return f"sha256:{hashlib.sha256(raw).hexdigest()}", value

    def _open(
        self, path: str, headers: Mapping[str, str], method: str = "GET", data: bytes | IO[bytes] | None = None
    ) -> http.client.HTTPResponse:
        """The answer for a path of the repository, or for a whole address that the registry gave."""
        scheme = "http" if without_https(self.env) else "https"
        url = path if "://" in path else f"{scheme}://{self.reference.host}/v2/{self.reference.name}/{path}"
        try:
            return self._request(url, headers, method, data)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise self._refused(error) from None
            challenge = error.headers.get("WWW-Authenticate", "")
        self._authorization = self._answer_to(challenge)
        if data is not None and not isinstance(data, bytes):
            data.seek(0)
        try:
            return self._request(url, headers, method, data)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None

    def _request(
        self, url: str, headers: Mapping[str, str], method: str = "GET", data: bytes | IO[bytes] | None = None
    ) -> http.client.HTTPResponse:
        request = urllib.request.Request(url, data, dict(headers), method=method)
        if self._authorization:
            # Not sent on where the registry redirects to a store of its own, which would refuse it.
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            return self._opener().open(request, timeout=_TIMEOUT_S)  # type: ignore[no-any-return]
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None

    def _opener(self) -> urllib.request.OpenerDirector:
        """Proxies as the site's environment names them, which is not this process's."""
        named = {
            s: self.env.get(f"{s}_proxy") or self.env.get(f"{s.upper()}_PROXY") or "" for s in ("http", "https", "no")
        }
        host = self.reference.host
        bypassed = bool(urllib.request.proxy_bypass_environment(host, {"no": named.pop("no")}))  # type: ignore[attr-defined]
        proxies = {} if bypassed else {scheme: address for scheme, address in named.items() if address}
        return urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=self._authorities())
        )

    def _authorities(self) -> ssl.SSLContext:
        """The machine's certificate authorities, and those that the site names."""
        context = ssl.create_default_context()
        file, folder = self.env.get("SSL_CERT_FILE"), self.env.get("SSL_CERT_DIR")
        if file or folder:
            try:
                context.load_verify_locations(file or None, folder or None)
            except OSError as error:
                why = "no certificate is in it" if isinstance(error, ssl.SSLError) else error.strerror
                raise SiteError(f"SSL_CERT_FILE={file}: {why}", "name a PEM file with the authority in it") from None
        return context

    def _answer_to(self, challenge: str) -> str | None:
        """The header that a challenge (RFC 9110, 11.6.1) asks for: the login itself, or a token in exchange for it."""
        login = _login(self.reference.host, self.env)
        basic = f"Basic {base64.b64encode(':'.join(login).encode()).decode()}" if login else None
        kind, _, rest = challenge.partition(" ")
        if kind.lower() != "bearer":
            return basic
        named = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        query = urllib.parse.urlencode({name: named[name] for name in ("service", "scope") if name in named})
        self._authorization = basic
        try:
            with self._request(f"{named.get('realm', '')}?{query}", {}) as answer:
                value = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except ValueError:  # no address, or no JSON
            value = {}
        token = value.get("token") or value.get("access_token") if isinstance(value, dict) else None
        return f"Bearer {token}" if token else basic

    def _refused(self, error: urllib.error.HTTPError) -> SiteError:
        login = f"apptainer registry login --username NAME {self.reference.scheme}://{self.reference.host}"
        if error.code in (401, 403):
            how = "does not accept your login for" if self._authorization else "wants a login for"
            message = f"{self.reference.host} {how} {self._shown} ({error.code})"
            return SiteError(message, f"{login}; a password or token may have expired")
        if error.code == 404:
            message = f"{self._shown}: {self.reference.host} has no such image"
            if self.reference.digest:
                message = f"{self.reference.pinned}: {self.reference.host} no longer has this digest"
            return SiteError(message, f"correct name and tag, or push it; a private one may want a login: {login}")
        cause = UNREACHABLE if error.code >= 500 else ""
        remedy = "try again; ask who runs the registry"
        return SiteError(
            f"{self._shown}: {self.reference.host} answers {error.code} {error.reason}", remedy, cause=cause
        )

    def _unreachable(self, error: Exception) -> SiteError:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        text = redact(str(getattr(reason, "strerror", None) or reason or type(error).__name__))
        if isinstance(reason, ssl.SSLError):
            remedy = "name the PEM file of its certificate authority, `SSL_CERT_FILE=FILE` in slurm/site.env; APPTAINER_NOHTTPS=1 for a registry without TLS"
            return SiteError(f"{self.reference.host} cannot be trusted: {text}", remedy)
        remedy = "is there a network here? name a proxy (https_proxy), or pull on a node that has one: afina image pull"
        return SiteError(f"{self.reference.host} cannot be reached: {text}", remedy, cause=UNREACHABLE)


def read_block(body: http.client.HTTPResponse, size: int) -> bytes:
    """Up to `size` bytes; a broken connection is a ConnectionError, whatever the library raises."""
    try:
        return body.read(size)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(redact(str(error) or type(error).__name__)) from None


def _of_this_machine(index: Mapping[str, Any], reference: Reference) -> str:
    """The digest of the manifest for this machine in an index of several."""
    machine = ARCHITECTURES.get(platform.machine(), platform.machine())
    for entry in index.get("manifests") or ():
        about = entry.get("platform") or {}
        if (about.get("os", "linux"), about.get("architecture", machine)) == ("linux", machine):
            return str(entry["digest"])
    message = f"{reference.host}/{reference.name}:{reference.tag} has no image for linux/{machine}"
    raise SiteError(message, "build one on such a machine: container/build.sh")


def _login(host: str, env: Mapping[str, str]) -> tuple[str, str] | None:
    """User and password for a host: from Apptainer's variables, from its and Docker's configuration, or from a helper named there."""
    for runtime in ("APPTAINER", "SINGULARITY"):
        user, password = (env.get(f"{runtime}_DOCKER_{part}") for part in ("USERNAME", "PASSWORD"))
        if user and password:
            return user, password
    home = Path(env.get("HOME") or "/")
    docker = Path(env.get("DOCKER_CONFIG") or home / ".docker")
    names = [host, f"https://{host}", *(DOCKER_HUB_NAMES if host == DOCKER_HUB else ())]
    for file in (home / ".apptainer/docker-config.json", docker / "config.json"):
        configuration = read_json(file)
        for name in names:
            entry = (configuration.get("auths") or {}).get(name) or {}
            with contextlib.suppress(ValueError, TypeError):
                user, colon, password = base64.b64decode(entry.get("auth") or "").decode().partition(":")
                if colon:
                    return user, password
            helper = (configuration.get("credHelpers") or {}).get(name) or configuration.get("credsStore")
            if helper and (login := _login_of_helper(str(helper), name, env)):
                return login
    return None


def _login_of_helper(helper: str, name: str, env: Mapping[str, str]) -> tuple[str, str] | None:
    """Ask `docker-credential-HELPER get` (docker-credential-helpers); None where it fails or knows nothing."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, KeyError):
        argv = [f"docker-credential-{helper}", "get"]
        done = subprocess.run(argv, input=name, env=dict(env), capture_output=True, text=True, timeout=60, check=True)
        value = json.loads(done.stdout)
        return str(value["Username"]), str(value["Secret"])
    return None
