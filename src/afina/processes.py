"""Whose turn it is: a courtesy among processes that would make the same thing, not a lock.

`with turn(FILE, "preparing …", say):` waits while another living process holds FILE, says once who that is, and then
holds it. No lock of the kernel is taken: on Lustre and NFS it may be refused, given to two, or stay with a node that died. The
holder is written into a small file, whose time it renews every few seconds. A holder on this machine is dead when its process is
gone; one elsewhere when its file has not changed for `PATIENCE_S` seconds of the waiter's own clock.

Not promised: that only one works. Two may, where a holder seemed dead and was only stuck. What they make is published so
that this does no harm: see `afina.publish`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["BEAT_S", "PATIENCE_S", "Beat", "Process", "boot_id", "started", "turn"]

BEAT_S = 5.0
#: More than an NFS client keeps a file's time to itself (60 s), and many beats.
PATIENCE_S = 90.0
_LONGEST_PAUSE_S = 1.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Process:
    """A process, told from every other, also from a later one with the same number.

    Attributes:
        host: its host's name.
        space: the namespace in which `pid` counts (a container may have its own); 0 where the system does not say.
        pid: its number there.
        started: clock ticks between the start of the machine and its own; 0 where the system does not say.
    """

    host: str
    space: int
    pid: int
    started: int

    @classmethod
    def here(cls) -> Process:
        return cls(socket.gethostname(), _space(), os.getpid(), started(os.getpid()) or 0)

    @classmethod
    def parse(cls, text: str) -> Process | None:
        """The process that `str` wrote down, or None."""
        parts = text.rsplit("-", 3)
        if len(parts) != 4 or not all(part.isdigit() for part in parts[1:]):
            return None
        return cls(parts[0], *(int(part) for part in parts[1:]))

    def __str__(self) -> str:
        return f"{self.host}-{self.space}-{self.pid}-{self.started}"

    def is_dead(self) -> bool | None:
        """None if that cannot be seen from here."""
        if (self.host, self.space) != (socket.gethostname(), _space()):
            return None
        now = started(self.pid)
        if now is not None:
            return bool(self.started) and now != self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # /proc may hide what others run
            return False
        return Path("/proc/self/stat").exists()  # it is there and /proc does not show it: a zombie


class Beat:
    """Renews the time of an open file or folder while the block runs, so that others see that it is in use."""

    def __init__(self, descriptor: int, every_s: float = BEAT_S) -> None:
        self._descriptor, self._every = descriptor, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)

    def _run(self) -> None:
        while not self._over.wait(self._every):
            # A file that was removed, or a file system that hangs: then others go on without us, which does no harm.
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def __enter__(self) -> Beat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@contextlib.contextmanager
def turn(path: Path, what: str, say: Say, *, patience_s: float = PATIENCE_S, beat_s: float = BEAT_S) -> Iterator[None]:
    """Hold `path` for the block; look again inside it whether there is anything left to do.

    Args:
        path: the file that stands for the turn; its folder exists and can be written.
        what: what the holder does, for the one line that waiters say: "preparing reviews".
        patience_s: seconds without a beat after which a holder counts as dead.

    Raises:
        OSError: the file can be neither made nor read.
    """
    me = Process.here()
    descriptor = _take(path, me, what, say, patience_s)
    try:
        if descriptor is None:
            yield
        else:
            with Beat(descriptor, beat_s):
                yield
    finally:
        if descriptor is not None:
            held = os.fstat(descriptor)
            os.close(descriptor)
            found = _look(path)
            if found is not None and found[1] == held.st_ino:
                path.unlink(missing_ok=True)


def _take(path: Path, me: Process, what: str, say: Say, patience_s: float) -> int | None:
    """The open file of our turn; None where a dead holder's cannot be removed, then there are no turns."""
    pause, said = 0.05, False
    seen: tuple[int, int, bytes] | None = None
    changed = time.monotonic()
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            pass
        else:
            os.write(descriptor, json.dumps({**asdict(me), "since": int(time.time()), "what": what}).encode())
            return descriptor
        found = _look(path)
        if found is None:
            continue
        if found != seen:
            seen, changed = found, time.monotonic()
        holder, since = _read(found[2])
        if (holder is not None and holder.is_dead()) or time.monotonic() - changed > patience_s:
            if not _remove(path, found[1]):
                return None
            continue
        if holder is not None and not said:
            said = True
            say(f"waiting: process {holder.pid} on {holder.host} has been {what} since {_clock(since)}")
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)


def _look(path: Path) -> tuple[int, int, bytes] | None:
    """Time of the last beat, number and content of the holder's file. It is opened, for only then NFS asks its server."""
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            return about.st_mtime_ns, about.st_ino, file.read(4096)
    except FileNotFoundError:
        return None


def _read(content: bytes) -> tuple[Process | None, int]:
    try:
        value = json.loads(content)
        return Process(value["host"], value["space"], value["pid"], value["started"]), int(value["since"])
    except (ValueError, KeyError, TypeError):  # killed between making and writing it
        return None, 0


def _remove(path: Path, number: int) -> bool:
    """Remove a dead holder's file; one that somebody has taken in the meantime is given back."""
    aside = path.with_name(f"{path.name}.{Process.here()}")
    try:
        path.rename(aside)
        if aside.stat().st_ino != number:
            aside.rename(path)
        else:
            aside.unlink()
    except FileNotFoundError:
        pass  # another waiter was first
    except OSError:
        return False
    return True


def _clock(since: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))


def _space() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def boot_id() -> str:
    """Linux's identifier of this machine's current boot: the same in every container on it, another after a restart."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def started(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did: field 22 of /proc/PID/stat (proc(5)); None if there is no such process, or only what is left of it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
