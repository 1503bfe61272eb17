"""Copies model and prepared data to each node's local disk before the processes start: `AFINA_STAGE`.

It helps where many nodes read the same files from shared storage at once, or where memory-mapped files are slow over the network.
`afina.worker.node.launcher` makes one copy per node, all ranks of the node read it, rank 0 verifies its own like the original, and
it is removed at the end. The next start on the node removes copies of killed processes: a lock shows which are in use. If copying
fails, the original is read, and the log gives the reason. Not covered: two jobs sharing a copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from afina.text import size_in_words

__all__ = ["VARIABLE", "Copied", "remove", "stage", "staged"]

#: The variable that tells the training processes of the node's copy.
VARIABLE = "AFINA_STAGED"

#: Bytes that stay free on the node's disk.
_SPARE = 1_000_000_000


class Copied(NamedTuple):
    """The node's copy, or None if nothing was copied, and a line for the log."""

    folder: Path | None
    message: str


def stage(prepared: Mapping[str, Any], root: Path, attempt: str) -> Copied:
    """Copy model and prepared data to this node.

    Args:
        prepared: `prepared.json` of the run: `prepared` and `model_folder` are copied.
        root: the folder on the node's disk.
    """
    began = time.monotonic()
    try:
        _clear(root)
        sources = {name: Path(prepared[key]) for name, key in (("prepared", "prepared"), ("model", "model_folder"))}
        size = sum(_size(source) for source in sources.values())
        free = shutil.disk_usage(root).free
        if free < size + _SPARE:
            return Copied(
                None, f"not staged: {size_in_words(size)} are needed, and {root} has {size_in_words(free)} free"
            )
        # Others can write in /tmp: a folder of this name that is already there is an error.
        folder = Path(f"{_prefix(root)}{attempt}.{os.getpid()}")
        folder.mkdir(mode=0o700)
        _hold(folder)
        try:
            for name, source in sources.items():
                # Links are followed: a model in a Hub cache consists of them.
                shutil.copytree(source, folder / name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except (OSError, shutil.Error) as error:
        return Copied(None, f"not staged: {error}")
    message = f"{size_in_words(size)} of model and data staged in {folder} in {time.monotonic() - began:.1f} s"
    return Copied(folder, message)


def staged(prepared: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    """`prepared` as this node reads it."""
    folder = env.get(VARIABLE)
    if not folder:
        return dict(prepared)
    return {**prepared, "prepared": f"{folder}/prepared", "model_folder": f"{folder}/model"}


def remove(env: Mapping[str, str]) -> None:
    """Remove the node's copy. Files that another rank has mapped stay readable for it."""
    if folder := env.get(VARIABLE):
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(root: Path) -> Path:
    return root / f"afina-stage-{os.getuid()}-"


def _hold(folder: Path) -> None:
    """Lock the folder for the life of this process, also after its `exec` into the training process or its launcher."""
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    os.set_inheritable(lock, True)


def _clear(root: Path) -> None:
    """Remove this user's copies that are not locked."""
    for folder in root.glob(f"{_prefix(root).name}*"):
        with contextlib.suppress(OSError), (folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
