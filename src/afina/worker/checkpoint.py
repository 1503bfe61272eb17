"""A checkpoint exists when its manifest does.

Everything is written into a staging folder; the manifest with the size and SHA-256 of every file comes last; all is
flushed to the disk and the folder is renamed to `step-<n>`. A reader trusts nothing else: the newest folder whose files
agree with their manifest wins, a damaged one is set aside under a name that says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.errors import EnvironmentProblem

__all__ = ["commit", "complete_steps", "damage", "newest", "rotate", "stage"]

_MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")


def stage(folder: Path, step: int) -> Path:
    """An empty staging folder for `step`; what an earlier attempt left there is removed."""
    staging = folder / f".staging-{step}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, mode=0o700)
    return staging


def commit(staging: Path, step: int, about: Mapping[str, Any]) -> Path:
    """Write the manifest, flush everything, rename to `step-<n>`; returns the checkpoint.

    Args:
        about: world size, geometry, versions, …; kept in the manifest.
    """
    files = {str(p.relative_to(staging)): _describe(p, flush=True) for p in sorted(staging.rglob("*")) if p.is_file()}
    manifest = staging / _MANIFEST
    with manifest.open("w", encoding="utf-8") as file:
        json.dump({"format": 1, "step": step, **about, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(staging)
    final = staging.parent / f"step-{step}"
    old = _set_aside(final, "replaced") if final.exists() else None
    staging.rename(final)
    _sync(final.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)
    return final


def manifest(checkpoint: Path) -> dict[str, Any]:
    value = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file agrees with the manifest."""
    try:
        files = manifest(checkpoint)["files"]
    except FileNotFoundError:
        return "no manifest"
    except (OSError, ValueError, KeyError, AssertionError) as error:
        return f"manifest cannot be read: {error}"
    for name, expected in files.items():
        path = checkpoint / name
        try:
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes, {expected['size']} were written"
            if _describe(path)["sha256"] != expected["sha256"]:
                return f"{name} differs from what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def complete_steps(folder: Path) -> list[int]:
    """Steps that have a committed checkpoint, ascending. Not verified."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name)) and (p / _MANIFEST).is_file())


def newest(folder: Path, *, set_aside: bool = True) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and a line for each damaged one that was found before it.

    Raises:
        EnvironmentProblem: there were checkpoints and none is usable: starting afresh would not be what was asked.
    """
    notes: list[str] = []
    found = (
        sorted((int(m[1]), p) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name))) if folder.is_dir() else []
    )
    for _, path in reversed(found):
        wrong = damage(path)
        if wrong is None:
            return path, notes
        aside = _set_aside(path, "damaged") if set_aside else path
        notes.append(f"checkpoint {path.name} is damaged ({wrong}); set aside as {aside.name}")
    if found:
        raise EnvironmentProblem(
            f"{folder}: no checkpoint is usable: " + "; ".join(notes),
            "restore one from a backup, or start a new run from the recipe; a run never starts over silently",
        )
    return None, notes


def rotate(folder: Path, keep: int, protected: int | None) -> None:
    """Remove the oldest checkpoints beyond `keep`, never the newest nor the protected step."""
    steps = complete_steps(folder)
    for step in steps[:-keep]:
        if step != protected:
            shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
    for path in folder.glob(".staging-*"):
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path, why: str) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def _describe(path: Path, *, flush: bool = False) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
        if flush:
            os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
