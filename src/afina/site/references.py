"""Addresses of images in a registry: `oras://HOST/NAME:TAG` (an Apptainer image), `docker://HOST/NAME:TAG` (an OCI one)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from afina.errors import SiteError
from afina.redact import redact

__all__ = ["DOCKER_HUB", "DOCKER_HUB_NAMES", "UNREACHABLE", "Reference", "is_reference"]

#: The cause of a `SiteError` where the registry does not answer at all.
UNREACHABLE = "unreachable"

DOCKER_HUB = "registry-1.docker.io"
#: Names of Docker's own registry in addresses and in its configuration.
DOCKER_HUB_NAMES = ("https://index.docker.io/v1/", "index.docker.io", "docker.io")

_REFERENCE = re.compile(
    r"(?P<scheme>oras|docker)://(?P<path>[^\s@:/]+(?::\d+)?(?:/[\w.-]+)*)(?::(?P<tag>[\w][\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)


def is_reference(text: str) -> bool:
    """True if AFINA_IMAGE is an address in a registry and not a path."""
    return text.startswith(("oras://", "docker://"))


@dataclass(frozen=True)
class Reference:
    """A name in a registry: `oras://HOST/NAME:TAG`, `docker://NAME@sha256:…`. A missing tag is `latest`; `docker://` alone has a default host."""

    scheme: str
    host: str
    name: str
    tag: str
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read an address.

        Raises:
            SiteError: it is none, holds a password, or has no host.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None:
            login = "log in with `apptainer registry login` instead of naming a password; " if "@" in text else ""
            raise SiteError(
                f"{redact(text)} is not the address of an image",
                f"{login}oras://HOST/NAME:TAG, docker://HOST/NAME:TAG, or either with @sha256:… of 64 hex digits",
            )
        host, _, name = match["path"].partition("/")
        if not (name and (re.search(r"[.:]", host) or host == "localhost")):
            if match["scheme"] == "oras":
                remedy = "oras://HOST/NAME:TAG: the host has a dot or a port, or is localhost"
                raise SiteError(f"{text} names no host", remedy)
            host, name = DOCKER_HUB, match["path"] if name else f"library/{match['path']}"
        elif host in DOCKER_HUB_NAMES:
            host = DOCKER_HUB
        return cls(match["scheme"], host, name, match["tag"] or "latest", match["digest"])

    @property
    def pinned(self) -> str:
        """The address by digest alone, which names the same image for ever."""
        host = "docker.io" if self.host == DOCKER_HUB else self.host
        return f"{self.scheme}://{host}/{self.name}@{self.digest}"
