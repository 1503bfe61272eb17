"""A checkpoint exists when its manifest does.

Everything is written into a staging folder; the manifest with the size and SHA-256 of every file, and its own, comes last; all is
flushed to the disk and the folder is renamed to `step-<n>`. A reader trusts nothing else: the newest folder whose files agree with
their manifest, and whose name, manifest and trainer state agree about the step, wins. A damaged one is set aside under a name that
says so.
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

__all__ = ["commit", "complete_steps", "damage", "manifest", "newest", "rotate", "stage", "staging_folder"]

_MANIFEST, _STATE = "manifest.json", "trainer_state.json"
_STEP = re.compile(r"step-(\d+)")

#: Format 1, of afina before 0.2, has no seal.
_FORMAT, _UNSEALED = 2, 1

#: Files that every checkpoint has, besides the weights.
_NEEDED = (_STATE, "progress.json", "ranks.pt", "optimizer.pt", "scheduler.pt")


def staging_folder(folder: Path, step: int) -> Path:
    return folder / f".staging-{step}"


def stage(folder: Path, step: int) -> Path:
    """An empty staging folder for `step`; leftovers of an earlier attempt are removed."""
    staging = staging_folder(folder, step)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, mode=0o700)
    return staging


def commit(staging: Path, step: int, about: Mapping[str, Any]) -> Path:
    """Write the manifest, flush everything, rename to `step-<n>`; returns the checkpoint.

    Args:
        about: world size, geometry, versions, …; kept in the manifest.
    """
    names = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
    disk.sync_tree(staging)
    content = {"format": _FORMAT, "step": step, **about, "files": disk.describe(staging, names)}
    text = json.dumps({**content, "sealed": disk.seal_of(content)}, indent=1)
    (staging / _MANIFEST).write_text(text, encoding="utf-8")
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
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, or of another step than the folder's name.
    """
    try:
        value = json.loads((checkpoint / _MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError("no manifest") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"manifest cannot be read: {error}") from None
    if not isinstance(value, dict) or value.get("format") not in (_FORMAT, _UNSEALED):
        raise ValueError("manifest is not one of a checkpoint")
    if value["format"] != _UNSEALED and value.get("sealed") != disk.seal_of(value):
        raise ValueError("manifest differs from what was written")
    files = value.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(r, dict) and {"size", "sha256"} <= set(r) for r in files.values()
    ):
        raise ValueError("manifest lists no files")
    if missing := [name for name in _NEEDED if name not in files]:
        raise ValueError(f"manifest lists no {missing[0]}")
    if checkpoint.name != f"step-{value.get('step')}":
        raise ValueError(f"manifest is of step {value.get('step')}")
    return value


def damage(checkpoint: Path) -> str | None:
    """The damage of a checkpoint in words, or None if manifest, files, folder name and trainer state agree."""
    try:
        record = manifest(checkpoint)
    except ValueError as error:
        return str(error)
    if wrong := disk.difference(checkpoint, record["files"]):
        return wrong
    step = disk.read_json(checkpoint / _STATE).get("global_step")
    return None if step == record["step"] else f"{_STATE} is of step {step}"


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
