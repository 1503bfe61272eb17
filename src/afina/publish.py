"""Publish folders by rename: a folder exists whole or not at all, however many processes make it and whenever they are killed.

    with staging(final) as folder:        a folder of our own beside `final`
        ...                               everything is written into it
        publish(folder, final, is_whole)  one rename; what another process published first stays

Correct without any lock. Leftovers of killed processes are removed by the next process that works in the same place: at once
if it ran on this machine, else when they have not changed for `LITTER_S` seconds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from afina.files import sync_folder, sync_tree
from afina.processes import Heartbeat, Process

__all__ = ["DAMAGED_S", "LITTER_S", "publish", "rename_new", "staging", "sweep"]

LITTER_S = 3600.0
#: A damaged folder that was set aside stays as long as a job that had opened it may run: on NFS, removing it would take the
#: files from under that job.
DAMAGED_S = 14 * 86400.0
_STAGING, _DAMAGED = ".staging-", ".damaged-"
#: What `advisory_lock` and `write_atomic` leave beside a file when they are killed.
_ASIDE = re.compile(r"\.turn-.*|\..+\.\d+\.[0-9a-f]{8}")


@contextlib.contextmanager
def staging(final: Path) -> Iterator[Path]:
    """A fresh folder beside `final`, removed on the way out unless it was published."""
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = final.with_name(f"{_STAGING}{final.name[-8:]}-{Process.current()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        # The time that the file system gave, not ours: clocks of nodes differ.
        sweep(final.parent, now=folder.stat().st_mtime)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with Heartbeat(descriptor):
                yield folder
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(staging: Path, final: Path, is_whole: Callable[[Path], bool]) -> bool:
    """Rename complete `staging` to `final`.

    Args:
        is_whole: whether a folder that is there already is as good; a damaged one is set aside, and a process that has
            it open keeps what it has.

    Returns:
        True if ours is now there; False if another's is: it stays, and `staging` is removed.
    """
    while True:
        try:
            staging.rename(final)
        except OSError as error:
            if error.errno == errno.ENOENT and not staging.exists() and is_whole(final):
                return True  # NFS repeats a request whose answer was lost; the rename was done
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
        else:
            sync_folder(final.parent)
            return True
        inode = _inode(final)
        if is_whole(final):
            shutil.rmtree(staging, ignore_errors=True)
            return False
        _set_aside(final, inode)


def rename_new(aside: Path, final: Path) -> bool:
    """Rename folder `aside` to `final`, and return when all of it is on the disk; False if something is there already, and `aside` stays.

    Raises:
        OSError: the rename failed for another reason, or the disk is full or broken.
    """
    sync_tree(aside)
    try:
        aside.rename(final)
    except OSError:
        if not final.exists():
            raise
        return False
    sync_folder(final.parent)
    return True


def sweep(folder: Path, *, now: float) -> None:
    """Remove from `folder` the leftovers of killed processes, and damaged folders that were set aside long ago.

    Args:
        now: the file system's time, seconds since 1970.
    """
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError):
            age = now - path.lstat().st_mtime
            if path.name.startswith(_STAGING):
                owner = Process.parse(path.name.removeprefix(_STAGING).partition("-")[2])
                dead = owner.is_dead() if owner is not None else None
                # One elsewhere has a heartbeat every few seconds while it lives.
                if dead or (dead is None and age > LITTER_S):
                    shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(_DAMAGED):
                if age > DAMAGED_S:
                    shutil.rmtree(path, ignore_errors=True)
            elif _ASIDE.fullmatch(path.name) and age > LITTER_S:
                path.unlink()


def _inode(path: Path) -> int | None:
    """The inode: it differs for another folder of the same name."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _set_aside(final: Path, inode: int | None) -> None:
    """Rename damaged `final`; a folder that was published since `inode` was read is given back."""
    attempt = 1
    while True:
        aside = final.with_name(f"{_DAMAGED}{final.name[-8:]}-{attempt}")
        try:
            final.rename(aside)
        except FileNotFoundError:
            return  # another process was first
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            attempt += 1
            continue
        if inode is not None and aside.stat().st_ino != inode:
            with contextlib.suppress(OSError):
                aside.rename(final)
            return
        os.utime(aside)  # its age counts from now
        return
