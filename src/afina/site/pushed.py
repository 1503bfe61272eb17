"""Push an image to a registry: as it is (`oras://`), or as an OCI image of the same files (`docker://`) for Docker, Podman, pyxis, Charliecloud, Kubernetes.

There is one image and one lock: the OCI image is made of the Apptainer image's files, environment and labels, in three layers. afina's own changes most
often and is small; a registry that has a layer does not get it again. Files belong to root, and the same files give the same layers.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from afina.errors import InputError, SiteError
from afina.files import read_json
from afina.files import sha256 as sha256_of
from afina.processes import run_captured
from afina.site.pulled import Say, to_stderr
from afina.site.references import Reference
from afina.site.registry import ARCHITECTURES, SIF_LAYER, Layer, Registry
from afina.site.variables import declared_size
from afina.text import size_in_words

__all__ = ["push"]

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_TAR_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_SIF_CONFIG = "application/vnd.sylabs.sif.config.v1+json"
_BLOCK = 1 << 20
#: What Apptainer adds to the files of an image.
_OF_APPTAINER = (".singularity.d", "singularity", "environment", ".exec", ".run", ".shell", ".test")


def push(image: Path, address: str, runtime: str, env: Mapping[str, str], say: Say = to_stderr) -> str:
    """Push `image`, a file or an unpacked one, and return its address by digest.

    Args:
        address: `oras://…`, for which `image` is a file, or `docker://…`, which is unpacked into `$TMPDIR` first.

    Raises:
        InputError: no such image, or an unpacked one for `oras://`.
        SiteError: no login, no connection, or the registry refuses.
    """
    reference = Reference.parse(address)
    if reference.digest:
        raise InputError(f"{address}: a digest results from a push", "give a tag: NAME:TAG")
    registry = Registry(reference, env)
    if reference.scheme == "oras":
        if not image.is_file() or declared_size(image) is None:
            raise InputError(f"{image}: not an Apptainer image (SIF)", "give the file that container/build.sh made")
        config = _push_bytes(registry, b"{}", _SIF_CONFIG)
        layers = [_push_file(registry, image, SIF_LAYER, say)]
    else:
        with (
            tempfile.TemporaryDirectory(prefix="afina-push-") as folder,
            _unpacked(image, Path(folder), runtime, env) as root,
        ):
            layers, diffs = [], []
            for number, layer in enumerate(_layers(root)):
                file = Path(folder) / f"layer{number}.tar.gz"
                say(f"packing layer {number + 1} of 3")
                diffs.append(_pack(root, layer, file))
                layers.append(_push_file(registry, file, _TAR_LAYER, say))
                file.unlink()
            config = _push_bytes(registry, json.dumps(_configuration(root, diffs), sort_keys=True).encode(), _CONFIG)
    raw = json.dumps(
        {"schemaVersion": 2, "mediaType": _MANIFEST, "config": _entry(config), "layers": [_entry(e) for e in layers]}
    ).encode()
    registry.put_manifest(raw, _MANIFEST)
    return f"{address}@sha256:{hashlib.sha256(raw).hexdigest()}"


def _entry(layer: Layer) -> dict[str, Any]:
    return {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}


def _push_bytes(registry: Registry, content: bytes, media_type: str) -> Layer:
    layer = Layer(media_type, f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))
    registry.put_blob(layer, io.BytesIO(content))
    return layer


def _push_file(registry: Registry, file: Path, media_type: str, say: Say) -> Layer:
    layer = Layer(media_type, f"sha256:{sha256_of(file)}", file.stat().st_size)
    with file.open("rb") as stream:
        sent = registry.put_blob(layer, stream)
    say(f"{layer.digest[:19]}…: {size_in_words(layer.size)} {'pushed' if sent else 'is there already'}")
    return layer


@contextmanager
def _unpacked(image: Path, folder: Path, runtime: str, env: Mapping[str, str]) -> Iterator[Path]:
    """The folder of an image's files; removed at the end if it was made here."""
    if image.is_dir():
        yield image
        return
    # Without a container, which some machines forbid to root.
    listed = _done([runtime, "sif", "list", str(image)], env)
    number = re.search(r"(?m)^\s*(\d+)\s*\|.*\|FS \(Squashfs/\*System/", listed)
    if number is None:
        raise InputError(f"{image}: no Apptainer image with a squashfs", "give the file that container/build.sh made")
    packed, root = folder / "files.squashfs", folder / "files"
    with packed.open("wb") as file:
        argv = [runtime, "sif", "dump", number[1], str(image)]
        subprocess.run(argv, env=dict(env), stdout=file, check=True)
    _done(["unsquashfs", "-no-xattrs", "-no-progress", "-dest", str(root), str(packed)], env)
    packed.unlink()
    try:
        yield root
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", str(root)], check=False, capture_output=True)


def _done(argv: list[str], env: Mapping[str, str]) -> str:
    """The output of a command.

    Raises:
        SiteError: it is missing, or fails: the disk may be full.
    """
    try:
        done = run_captured(argv, env)
    except OSError as error:
        raise SiteError(
            f"{argv[0]} cannot be run: {error.strerror}", "load Apptainer's module, install squashfs-tools"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a message"])[-1]
        raise SiteError(
            f"{argv[0]} failed: {last}", f"{tempfile.gettempdir()} (TMPDIR) needs room for the image's files"
        )
    return done.stdout


def _layers(root: Path) -> list[list[str]]:
    """The paths of each layer, relative to the root and sorted: the system, the packages, afina itself."""
    layers: tuple[list[str], list[str], list[str]] = ([], [], [])
    for folder, folders, files in os.walk(root):
        place = os.path.relpath(folder, root)
        if place == ".":
            folders[:] = [name for name in folders if name not in _OF_APPTAINER]
            files = [name for name in files if name not in _OF_APPTAINER]
        for name in (*folders, *files):
            path = os.path.normpath(f"{place}/{name}")
            layers[_layer_of(path)].append(path)
    return [sorted(paths) for paths in layers]


def _layer_of(path: str) -> int:
    if not path.startswith("opt/afina/"):
        return 0
    inside = path.split("/site-packages/", 1)[-1]
    own = (
        inside.startswith(("afina/", "afina-"))
        or inside == "afina"
        or path in ("opt/afina/bin/afina", "opt/afina/packages.json")
    )
    return 2 if own else 1


class _Packed:
    """A compressed file that takes the digest of what is written before its compression."""

    def __init__(self, file: Path) -> None:
        self._file, self.digest = gzip.GzipFile(file, "wb", compresslevel=6, mtime=0), hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


def _pack(root: Path, paths: list[str], file: Path) -> str:
    """Write a layer and return the digest of the tar file in it, which an image's configuration lists."""
    packed = _Packed(file)
    with (
        closing(packed),
        tarfile.open(fileobj=cast(IO[bytes], packed), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_BLOCK) as tar,
    ):
        for path in paths:
            about = tar.gettarinfo(str(root / path), path)
            if about is None:  # a socket
                continue
            about.uid = about.gid = 0
            about.uname = about.gname = ""
            about.mtime = int(about.mtime)
            if about.isreg():
                with (root / path).open("rb") as content:
                    tar.addfile(about, content)
            elif about.isdir() or about.issym() or about.islnk():
                tar.addfile(about)
    return f"sha256:{packed.digest.hexdigest()}"


def _configuration(root: Path, diffs: list[str]) -> dict[str, Any]:
    """The OCI configuration: afina as the program, with the environment and the labels of the Apptainer image."""
    script = root / ".singularity.d/env/90-environment.sh"
    argv = ["env", "-i", "sh", "-c", '[ ! -f "$1" ] || . "$1"; env -0', "sh", str(script)]
    listed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    variables = [
        pair for pair in listed.split("\0") if pair and not pair.startswith(("PWD=", "SHLVL=", "_=", "OLDPWD="))
    ]
    return {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {
            "Env": sorted(variables),
            "Entrypoint": ["afina"],
            "Cmd": ["--help"],
            "Labels": read_json(root / ".singularity.d/labels.json"),
        },
        "rootfs": {"type": "layers", "diff_ids": diffs},
        # Optional in OCI's specification; Charliecloud refuses an image without it.
        "history": [{"created_by": f"afina image push: {name}"} for name in ("system", "packages", "afina")],
    }
