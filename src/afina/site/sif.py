"""What an image says of itself, read from the file: header, labels, signatures, file system. Nothing is run or mounted.

SIF is a header, a table of objects and the objects, all little-endian (https://github.com/apptainer/sif, pkg/sif). The
labels are in the object `inspect-metadata.json`, which Apptainer and SingularityCE 3.6 and newer write; an older image has none
here. A folder (an unpacked image) has them in `.singularity.d/labels.json`. Not covered: encrypted and OCI images.
"""

from __future__ import annotations

import json
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from afina.errors import InputError

__all__ = ["FileSystem", "Image", "Signature", "read_image"]

_HEADER = struct.Struct("<32s10s3s3s16s8q")
_OBJECT = struct.Struct("<i?III7q128s384s")
_SQUASHFS = struct.Struct("<5I6H4Q")
_PARTITION, _SIGNATURE, _JSON = 0x4004, 0x4005, 0x4006
_PRIMARY = 2  # of the kinds of partition: the root file system
_ARCHITECTURES = {"01": "386", "02": "amd64", "03": "arm", "04": "arm64", "05": "ppc64", "06": "ppc64le", "09": "s390x", "10": "riscv64"}  # fmt: skip
_HASHES = {1: "sha256", 2: "sha384", 3: "sha512", 4: "blake2s", 5: "blake2b"}
_COMPRESSIONS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}


@dataclass(frozen=True)
class FileSystem:
    """The squashfs in an image. `files` counts folders and links too; `made` is in seconds since 1970; sizes in bytes."""

    compression: str
    block_bytes: int
    files: int
    made: int
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Signature:
    """That somebody signed, not that it is true: `by` is a PGP fingerprint, or None for a PEM key or a certificate."""

    by: str | None
    hashed: str


@dataclass(frozen=True)
class Image:
    """An image file, or an unpacked one (then `size_bytes` and all that only a file has is None or empty).

    `promised_bytes` is the size that the header speaks of: a file that is shorter is cut off.
    """

    path: Path
    labels: dict[str, str]
    size_bytes: int | None = None
    promised_bytes: int | None = None
    identity: str | None = None
    created: int | None = None
    architecture: str | None = None
    file_system: FileSystem | None = None
    signatures: tuple[Signature, ...] = ()


def read_image(path: str | Path) -> Image:
    """Read an image's own description, a few kilobytes of it.

    Raises:
        InputError: there is no such file or folder, it cannot be read, or it is no image.
    """
    path = Path(path).expanduser().absolute()
    try:
        if path.is_dir():
            return _folder(path)
        with path.open("rb") as file:
            return _file(path, file)
    except FileNotFoundError:
        raise InputError(f"{path}: no such image", "give the path of a .sif that container/build.sh made") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", "check the path and its permissions") from None


def _folder(path: Path) -> Image:
    labels = path / ".singularity.d/labels.json"
    if not (path / ".singularity.d").is_dir():
        raise InputError(f"{path}: a folder, and not an unpacked image: it has no .singularity.d", "give the .sif file")
    return Image(path, _labels(labels.read_bytes()) if labels.is_file() else {})


def _file(path: Path, file: BinaryIO) -> Image:
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or head[32:42] != b"SIF_MAGIC\0":
        raise InputError(
            f"{path}: not an Apptainer image (SIF)",
            "build one with container/build.sh; a broken download has the same look",
        )
    _, _, _, arch, identity, created, _, _, total, table, table_bytes, data, data_bytes = _HEADER.unpack(head)
    size = file.seek(0, 2)
    labels: dict[str, str] = {}
    file_system = None
    signatures = []
    promised = data + data_bytes
    for number in range(min(total, table_bytes // _OBJECT.size, 4096)):
        file.seek(table + number * _OBJECT.size)
        raw = file.read(_OBJECT.size)
        if len(raw) < _OBJECT.size:
            promised = max(promised, table + table_bytes)
            break
        kind, used, *_, name, extra = _OBJECT.unpack(raw)
        offset, length = _OBJECT.unpack(raw)[5:7]
        if not used:
            continue
        promised = max(promised, offset + length)
        if kind == _JSON and name.rstrip(b"\0") == b"inspect-metadata.json":
            file.seek(offset)
            labels = _labels(file.read(min(length, 1 << 24)))
        elif kind == _PARTITION and struct.unpack_from("<2i", extra)[1] == _PRIMARY:
            file_system = _squashfs(file, offset)
        elif kind == _SIGNATURE:
            hashed, entity = struct.unpack_from("<i20s", extra)
            signatures.append(Signature(entity.hex() if any(entity) else None, _HASHES.get(hashed, "unknown")))
    return Image(
        path=path,
        labels=labels,
        size_bytes=size,
        promised_bytes=promised,
        identity=str(uuid.UUID(bytes=identity)),
        created=created,
        architecture=_ARCHITECTURES.get(arch[:2].decode("ascii", "replace")),
        file_system=file_system,
        signatures=tuple(signatures),
    )


def _squashfs(file: BinaryIO, offset: int) -> FileSystem | None:
    """From the superblock (https://dr-emann.github.io/squashfs); None where the root is of another kind."""
    file.seek(offset)
    raw = file.read(_SQUASHFS.size)
    if len(raw) < _SQUASHFS.size or raw[:4] != b"hsqs":
        return None
    _, files, made, block, _, compression, *_, size, _, _ = _SQUASHFS.unpack(raw)
    return FileSystem(_COMPRESSIONS.get(compression, "unknown"), block, files, made, offset, size)


def _labels(raw: bytes) -> dict[str, str]:
    """From `inspect-metadata.json` or `labels.json`; none where the bytes are damaged."""
    try:
        said: Any = json.loads(raw)
        if "data" in said:
            said = said["data"]["attributes"].get("labels") or {}
        return {str(name): str(value) for name, value in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
