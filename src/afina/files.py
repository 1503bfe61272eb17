"""What every file that must outlive a crash needs: its SHA-256, and that it has really reached the disk.

No torch, no NumPy; used by prepared data, the model's record and checkpoints alike. A rename is durable only after
`sync_folder` of the folder that holds the new name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from afina.errors import EnvironmentProblem

__all__ = [
    "FileRecord",
    "describe",
    "difference",
    "readable_size",
    "sha256",
    "sync_file",
    "sync_folder",
    "write_atomic",
]

#: Bytes read at once: larger blocks fall out of the core's cache before they are hashed.
_BLOCK = 1 << 20


class FileRecord(TypedDict):
    """What a manifest says of a file: bytes, and 64 hex digits."""

    size: int
    sha256: str


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits.

    Raises:
        OSError: it cannot be opened or read.
    """
    digest = hashlib.sha256()
    block = bytearray(_BLOCK)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(view[:count])
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Return when the file's content and size are on the disk (`fsync`); its name is the folder's.

    Raises:
        OSError: the disk is full or broken: what was written is not there.
    """
    _sync(path)


def sync_folder(path: Path) -> None:
    """Return when the names in a folder are on the disk. Where a file system knows no such thing, nothing happens."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write aside, fsync, replace: a reader sees the old file or the new one, never a part.

    Raises:
        EnvironmentProblem: no space, no quota, no permission; what was there is untouched.
    """
    raw = data.encode() if isinstance(data, str) else data
    # Not the process id alone: processes of two nodes may share one.
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with aside.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise EnvironmentProblem(
            f"{path}: {error.strerror}", "free space or quota (`df`, `quota`), then run the same command again"
        ) from error


def describe(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and SHA-256 of each file of `names` in `folder`, as `difference` wants them.

    Raises:
        OSError: one cannot be read.
    """
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}


def difference(folder: Path, files: Mapping[str, FileRecord], *, digests: bool = True) -> str | None:
    """The first file that is not what was recorded, and how: "PATH: is missing"; None if all agree.

    Args:
        digests: read everything and compare SHA-256 too; without, only presence and size.
    """
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                return f"{path}: has {size} bytes, {expected['size']} were written"
            if digests and sha256(path) != expected["sha256"]:
                return f"{path}: its content differs from what was written"
        except FileNotFoundError:
            return f"{path}: is missing"
        except OSError as error:
            return f"{path}: cannot be read: {error.strerror}"
    return None


def readable_size(count: int) -> str:
    """Bytes as people write them: `3 MiB`."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
