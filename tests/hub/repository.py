"""A repository on the test hub's disk: commits, their files, and what the Hub's interface tells of them."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = ["File", "Repo", "entries", "files_of"]

# Tracked by LFS on the Hub (its default .gitattributes): etag is the sha256, content comes from another origin.
_LFS = ("*.safetensors", "*.bin", "*.pt", "*.h5", "*.onnx", "*.parquet", "*.arrow", "*.gz", "*.zip", "*.zst", "*.model")


@dataclass(frozen=True)
class File:
    path: Path
    size: int
    oid: str  # git blob sha1
    sha256: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Repo:
    kind: str  # "models" or "datasets"
    id: str
    folder: Path

    def commits(self) -> dict[str, Path]:
        """{sha: folder}, oldest first. The sha follows from the name and content of all commits up to it."""
        chain = hashlib.sha1(f"{self.kind}/{self.id}".encode())
        found = {}
        for folder in sorted(path for path in (self.folder / "commits").iterdir() if path.is_dir()):
            for name, file in files_of(folder).items():
                chain.update(f"{name}\0{file.sha256}\0".encode())
            chain.update(folder.name.encode())
            found[chain.hexdigest()] = folder
        return found


@lru_cache(maxsize=256)
def files_of(folder: Path) -> dict[str, File]:
    """Files of one commit. Cached: a commit does not change."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = File(
            path=path,
            size=len(content),
            oid=hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            sha256=hashlib.sha256(content).hexdigest(),
            lfs=any(fnmatch.fnmatch(path.name, pattern) for pattern in _LFS),
        )
    return found


def entries(files: Mapping[str, File], below: str, recursive: bool) -> list[dict[str, Any]]:
    """A tree listing: the files under `below`, and the folders that hold them; empty if there is no `below`."""
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
    depth = below.count("/") + 1 if below else 0
    return [entry for path, entry in listed.items() if recursive or path == below or path.count("/") == depth]
