"""Files that must outlive a crash: atomic writes, durable renames, SHA-256, manifests; JSON objects; NUL-separated words.

A rename is durable only after `sync_folder` of the folder that holds the new name. Folders are published in `afina.publish`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pwd
import secrets
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from afina.errors import EnvironmentProblem, nearest

__all__ = [
    "FileRecord",
    "append_line",
    "describe",
    "difference",
    "encode_words",
    "name_aside",
    "nearest_path",
    "permission_remedy",
    "read_json",
    "read_words",
    "seal_of",
    "sha256",
    "sync_file",
    "sync_folder",
    "sync_tree",
    "write_atomic",
    "write_problem",
]

#: Bytes read at once: larger blocks fall out of the core's cache before they are hashed.
_BLOCK = 1 << 20


class FileRecord(TypedDict):
    """A file in a manifest: bytes, and 64 hex digits."""

    size: int
    sha256: str


def name_aside(path: Path) -> Path:
    """A hidden name beside `path`, for what will be renamed to it. Leftovers are removed by `afina.publish.sweep`."""
    # Not the process id alone: processes of two nodes may share one.
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write aside, fsync, replace: a reader sees the old file or the new one, never a part, also after a power cut.

    Raises:
        EnvironmentProblem: no space, no quota, no permission; what was there is untouched.
    """
    raw = data.encode() if isinstance(data, str) else data
    aside = name_aside(path)
    try:
        with aside.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise write_problem(path, error) from error


def write_problem(path: Path, error: OSError) -> EnvironmentProblem:
    """The error for a file or folder that cannot be written: closed, without its folder, or on a full disk."""
    remedy = "free space or quota (`df`, `quota`)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "correct the permissions of the folder"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        remedy = (
            f"{path.parent} is gone: put it back where it was (a scratch may have been purged, moved or not mounted)"
        )
    return EnvironmentProblem(f"{path}: {error.strerror}", f"{remedy}, then run the same command again")


def append_line(path: Path, line: str) -> int:
    """Append a line as a whole, for the only writer of a file; a torn last line is removed first. Returns the bytes of it.

    Raises:
        OSError: the line cannot be written; nothing of it stays.
    """
    raw = (line + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        size = end = os.fstat(descriptor).st_size
        while end and os.pread(descriptor, 1, end - 1) != b"\n":
            end -= 1
        os.ftruncate(descriptor, end)
        done = 0
        try:
            while done < len(raw):  # a disk that is full for a moment takes a part of the line
                done += os.pwrite(descriptor, raw[done:], end + done)
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)
    return size - end


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where the file is missing or damaged, or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def permission_remedy(path: Path) -> str:
    """The remedy for a file or folder that this user may not use: names its owner where that is somebody else."""
    there = next((folder for folder in (path, *path.parents) if _visible(folder)), path)
    try:
        owner = there.stat().st_uid
    except OSError:
        return "choose a folder that you may write to"
    if owner == os.getuid():
        return f"choose a folder that you may write to, or open it: {shlex.join(['chmod', 'u+rwX', str(there)])}"
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"user {owner}"
    opened = shlex.join(["chmod", "-R", "g+rwX", str(there)])
    return (
        f"{there} belongs to {name}, whose umask keeps others out: ask for `{opened}` and for `umask 007` in the site file, or set "
        "AFINA_SCRATCH to a folder of your own"
    )


def _visible(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def encode_words(words: Iterable[str]) -> bytes:
    """Words as bash reads them whatever they hold: `mapfile -d ''`. Each ends with a NUL."""
    return b"".join(os.fsencode(word) + b"\0" for word in words)


def read_words(path: Path) -> list[str]:
    """The words of a file that `encode_words` made.

    Raises:
        OSError: it cannot be read.
    """
    return [os.fsdecode(word) for word in path.read_bytes().split(b"\0")[:-1]]


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


def nearest_path(path: Path) -> str:
    """The remedy for a file or folder that is not there: its link leads nowhere, or the nearest name beside it; else empty."""
    try:
        if path.is_symlink():
            return (
                f"it is a link to {path.readlink()}, and there is nothing: mount or restore that, or correct the link"
            )
        return nearest(path.name, [] if path.exists() else [beside.name for beside in path.parent.iterdir()])
    except OSError:  # no folder above, or one that is closed to us
        return ""


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


def seal_of(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over a manifest itself, without its entry `sealed`, which holds it: an altered manifest counts as damage too."""
    content = {key: value for key, value in manifest.items() if key != "sealed"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def sync_tree(folder: Path) -> None:
    """Return when everything in a folder is on the disk: the content of all files, and their names.

    Raises:
        OSError: the disk is full or broken.
    """
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)
    sync_folder(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
