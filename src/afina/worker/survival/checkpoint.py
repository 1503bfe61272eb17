"""A checkpoint exists when its manifest does.

Everything is written into a staging folder; the manifest with the size and SHA-256 of every file comes last; all is
flushed to the disk and the folder is renamed to `step-<n>`. A reader trusts nothing else: the newest folder whose files
agree with their manifest wins, a damaged one is set aside under a name that says so.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina import files as disk
from afina.errors import EnvironmentProblem

__all__ = ["commit", "complete_steps", "damage", "manifest", "newest", "rotate", "stage"]

_MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)")


def stage(folder: Path, step: int) -> Path:
    """An empty staging folder for `step`; leftovers of an earlier attempt are removed."""
    staging = folder / f".staging-{step}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, mode=0o700)
    return staging


def commit(staging: Path, step: int, about: Mapping[str, Any]) -> Path:
    """Write the manifest, flush everything, rename to `step-<n>`; returns the checkpoint.

    Args:
        about: world size, geometry, versions, …; kept in the manifest.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        disk.sync_file(path)
        files[str(path.relative_to(staging))] = {"size": path.stat().st_size, "sha256": disk.sha256(path)}
    (staging / _MANIFEST).write_text(
        json.dumps({"format": 1, "step": step, **about, "files": files}, indent=1), encoding="utf-8"
    )
    disk.sync_file(staging / _MANIFEST)
    disk.sync_folder(staging)
    final = staging.parent / f"step-{step}"
    if final.exists():
        if damage(final) is None:
            _remove(staging)  # the same step of the same run: keep the existing one
            return final
        _set_aside(final, "damaged")
    staging.rename(final)
    disk.sync_folder(final.parent)
    return final


def manifest(checkpoint: Path) -> dict[str, Any]:
    value = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def damage(checkpoint: Path) -> str | None:
    """The damage of a checkpoint in words, or None if every file agrees with the manifest."""
    try:
        files = manifest(checkpoint)["files"]
    except FileNotFoundError:
        return "no manifest"
    except (OSError, ValueError, KeyError, AssertionError) as error:
        return f"manifest cannot be read: {error}"
    return disk.difference(checkpoint, files)


def complete_steps(folder: Path) -> list[int]:
    """Steps that have a committed checkpoint, ascending. Not verified."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name)) and (p / _MANIFEST).is_file())


def newest(folder: Path, *, set_aside: bool = True) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and a line for each newer one that is damaged.

    Raises:
        EnvironmentProblem: there are checkpoints and none is usable; a run never starts over silently.
    """
    notes: list[str] = []
    numbered = (
        sorted((int(m[1]), p) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name))) if folder.is_dir() else []
    )
    for _, path in reversed(numbered):
        wrong = damage(path)
        if wrong is None:
            return path, notes
        aside = _set_aside(path, "damaged") if set_aside else path
        notes.append(f"checkpoint {path.name} is damaged ({wrong}); set aside as {aside.name}")
    if numbered:
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
            _remove(folder / f"step-{step}")
    for pattern in (".staging-*", ".removed-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a crash in between does not leave one that looks damaged."""
    aside = path.with_name(f".removed-{path.name.lstrip('.')}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _set_aside(path: Path, why: str) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside
