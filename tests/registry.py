"""A real registry (Debian's docker-registry) on the loopback interface, and a proxy before it that breaks connections."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["LOGIN", "BreakingProxy", "RegistryServer", "tiny_image"]

#: User and password of a registry that wants a login.
LOGIN = ("alice", "wonderland-secret")
#: `htpasswd -nbB alice wonderland-secret`
_HTPASSWD = "alice:$2y$05$r145CzwIZ/hfM5Aok2I2KOOY42aTVQBXjIos.IipSoXepjozdSxO2\n"


class RegistryServer:
    """`with RegistryServer(folder) as registry:` serves what is pushed to `registry.host`, over HTTP.

    With `tls` over HTTPS, with a certificate of an authority of its own: the file `registry.authority`.
    """

    def __init__(self, folder: Path, *, login: bool = False, tls: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log, self.authority = folder, folder / "log", folder / "authority.pem"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.host = f"localhost:{self.port}"
        storage = {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}}
        http: dict[str, Any] = {"addr": f"127.0.0.1:{self.port}"}
        if tls:
            http["tls"] = self._certificate()
        settings = {"version": 0.1, "storage": storage, "http": http}
        if login:
            (folder / "htpasswd").write_text(_HTPASSWD)
            settings["auth"] = {"htpasswd": {"realm": "afina", "path": str(folder / "htpasswd")}}
        (folder / "config.yml").write_text(json.dumps(settings))

    def __enter__(self) -> RegistryServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _certificate(self) -> dict[str, str]:
        """An authority, and a certificate and key of localhost that it signed."""
        key, certificate = self.folder / "key.pem", self.folder / "certificate.pem"
        words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9"
        make, ca_key = shlex.split(words), self.folder / "ca.key"
        own = ["-subj", "/CN=afina test authority", "-keyout", ca_key, "-out", self.authority]
        subprocess.run([*make, *own], check=True, capture_output=True)
        signed = ["-CA", self.authority, "-CAkey", ca_key, "-addext", "subjectAltName=DNS:localhost"]
        server = ["-subj", "/CN=localhost", "-addext", "basicConstraints=CA:FALSE", "-keyout", key, "-out", certificate]
        subprocess.run([*make, *signed, *server], check=True, capture_output=True)
        return {"certificate": str(certificate), "key": str(key)}

    def start(self) -> None:
        argv = ["docker-registry", "serve", str(self.folder / "config.yml")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def digest(self, name: str, tag: str) -> str:
        return self._manifest(name, tag)[0]

    def configuration(self, name: str, tag: str) -> dict[str, Any]:
        """The configuration of an OCI image."""
        digest = self._manifest(name, tag)[1]["config"]["digest"]
        with urllib.request.urlopen(f"http://{self.host}/v2/{name}/blobs/{digest}", timeout=10) as answer:
            return dict(json.load(answer))

    def _manifest(self, name: str, tag: str) -> tuple[str, dict[str, Any]]:
        accept = "application/vnd.oci.image.manifest.v1+json"
        request = urllib.request.Request(f"http://{self.host}/v2/{name}/manifests/{tag}", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.headers["Docker-Content-Digest"]), json.load(answer)


class BreakingProxy:
    """Passes bytes on to `port`, and cuts each of the next `breaks` connections after `after` bytes of the answer.

    Attributes:
        sent: bytes of answers that were passed on.
        hold: a file: with it, an answer pauses after `after` bytes until the file exists.
    """

    def __init__(self, port: int, *, after: int = 0, breaks: int = 0, hold: Path | None = None) -> None:
        self._target, self.after, self.breaks, self.hold, self.sent = port, after, breaks, hold, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"localhost:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._target)) as server:
            threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
            count = 0
            while block := server.recv(1 << 16):
                client.sendall(block)
                count += len(block)
                self.sent += len(block)
                if self.after and count > self.after and self.breaks:
                    self.breaks -= 1
                    break
                while self.hold and count > self.after and not self.hold.exists():
                    time.sleep(0.02)
            client.shutdown(socket.SHUT_RDWR)
            server.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _requests(client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := client.recv(1 << 16):
                server.sendall(block)


def tiny_image(path: Path, content: bytes) -> Path:
    """An Apptainer image with Bash and a file `content`: 2 MB beside it."""
    root = path.with_suffix(".root")
    (root / "bin").mkdir(parents=True)
    listed = subprocess.run(["ldd", "/bin/bash"], capture_output=True, text=True, check=True).stdout
    for name in ("/bin/bash", *(word for word in listed.split() if word.startswith("/"))):
        (root / name.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, root / name.lstrip("/"))
    (root / "bin/sh").symlink_to("bash")
    (root / "content").write_bytes(content)
    subprocess.run(["apptainer", "--quiet", "build", "--force", str(path), str(root)], check=True, capture_output=True)
    shutil.rmtree(root)
    return path


@contextlib.contextmanager
def proxied(registry: RegistryServer, **faults: object) -> Iterator[BreakingProxy]:
    proxy = BreakingProxy(registry.port, **faults)  # type: ignore[arg-type]
    yield proxy
    proxy.close()
