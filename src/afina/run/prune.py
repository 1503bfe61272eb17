"""Prune: remove the checkpoints of a finished run that nothing needs any more; `model/` and every record stay.

Not covered: runs that have not finished. Their checkpoints are what they resume from.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from afina.errors import InputError
from afina.run.directory import RunDir

__all__ = ["KeepAfter", "Pruned", "prune"]

KeepAfter = Literal["best", "none", "all"]


@dataclass(frozen=True)
class Pruned:
    """Checkpoints that were removed from `checkpoints/` (or would be), and those that stay: names and bytes."""

    run: Path
    removed: dict[str, int]
    kept: dict[str, int]


def prune(run: RunDir, keep: KeepAfter, *, dry_run: bool = False) -> Pruned:
    """Remove checkpoints of a finished run, damaged and unfinished ones too.

    Args:
        keep: `best`: the one whose weights are in `model/`.
        dry_run: remove nothing.

    Raises:
        InputError: the run has not finished, an attempt works in it, or `model/` is not there.
    """
    outcome = run.outcome()
    if outcome is None or outcome.outcome != "finished":
        raise InputError(f"{run.path}: has not finished: it resumes from its checkpoints", "prune it when it has")
    if not any(run.model.glob("*.safetensors")):
        raise InputError(
            f"{run.path}: `model/` has no weights: its checkpoints are the only ones", "restore `model/` first"
        )
    # Outcomes of older versions may lack the first.
    best = f"step-{outcome.model_step or outcome.best_step or outcome.global_step}"
    removed: dict[str, int] = {}
    kept: dict[str, int] = {}
    for path in sorted(run.checkpoints.iterdir()) if run.checkpoints.is_dir() else []:
        stays = keep == "all" or (keep == "best" and path.name == best)
        (kept if stays else removed)[path.name] = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        if not stays and not dry_run:
            # Renamed first: a removal that is interrupted leaves nothing that looks like a damaged checkpoint.
            aside = path.with_name(f".removed-{path.name.lstrip('.')}")
            if aside != path:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    return Pruned(run.path, removed, kept)
