"""Who a process is, whether it lives, its heartbeat; and an advisory lock for shared file systems.

`with advisory_lock(FILE, "preparing …", say):` waits while another living process holds FILE, says once who that is, and then holds
it. Correctness does not depend on it: two may hold it where a holder seemed dead and was only stuck, and what they make is
published so that this does no harm (`afina.publish`). No lock of the kernel is used: on Lustre and NFS it may be refused, given to
two, or stay with a node that died. The holder is written into a small file, whose time it renews every few seconds. A holder on
this machine is dead when its process is gone; one elsewhere when its file has not changed for `PATIENCE_S` seconds of the
waiter's own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = [
    "HEARTBEAT_S",
    "Heartbeat",
    "PATIENCE_S",
    "Process",
    "advisory_lock",
    "boot_id",
    "run_captured",
    "spawn_detached",
    "start_time",
]

HEARTBEAT_S = 5.0
#: More than an NFS client keeps a file's time to itself (60 s), and many heartbeats.
PATIENCE_S = 90.0
_LONGEST_PAUSE_S = 1.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Process:
    """A process, different from every other, also from a later one with the same number.

    Attributes:
        host: its host's name.
        space: the namespace in which `pid` counts (a container may have its own); 0 where the system does not tell.
        pid: its number there.
        started: clock ticks between the start of the machine and its own; 0 where the system does not tell.
    """

    host: str
    space: int
    pid: int
    started: int

    @classmethod
    def current(cls) -> Process:
        return cls(socket.gethostname(), _pid_namespace(), os.getpid(), start_time(os.getpid()) or 0)

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
        """None if that cannot be known here."""
        if (self.host, self.space) != (socket.gethostname(), _pid_namespace()):
            return None
        now = start_time(self.pid)
        if now is not None:
            return bool(self.started) and now != self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # /proc may hide what others run
            return False
        return Path("/proc/self/stat").exists()  # it is there and /proc does not show it: a zombie


class Heartbeat:
    """Renews the time of an open file or folder while the block runs, so that others see that it is in use."""

    def __init__(self, descriptor: int, every_s: float = HEARTBEAT_S) -> None:
        self._descriptor, self._every = descriptor, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def _run(self) -> None:
        while not self._over.wait(self._every):
            # A file that was removed, or a file system that hangs: then others go ahead without us, which does no harm.
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@contextlib.contextmanager
def advisory_lock(
    path: Path, what: str, say: Say, *, patience_s: float = PATIENCE_S, heartbeat_s: float = HEARTBEAT_S
) -> Iterator[None]:
    """Hold `path` for the block; check again inside it whether there is anything left to do.

    Args:
        path: the lock's file; its folder exists and can be written.
        what: what the holder does, for the one line that waiters say: "preparing reviews".
        patience_s: seconds without a heartbeat after which a holder counts as dead.

    Raises:
        OSError: the file can be neither made nor read.
    """
    descriptor = _acquire(path, Process.current(), what, say, patience_s)
    try:
        if descriptor is None:
            yield
        else:
            with Heartbeat(descriptor, heartbeat_s):
                yield
    finally:
        if descriptor is not None:
            held = os.fstat(descriptor)
            os.close(descriptor)
            current = _examine(path)
            if current is not None and current[1] == held.st_ino:
                path.unlink(missing_ok=True)


def _acquire(path: Path, me: Process, what: str, say: Say, patience_s: float) -> int | None:
    """The open file of our lock; None where a dead holder's cannot be removed: then there are no locks here."""
    pause, announced = 0.05, False
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
        current = _examine(path)
        if current is None:
            continue
        if current != seen:
            seen, changed = current, time.monotonic()
        holder, since = _holder(current[2])
        if (holder is not None and holder.is_dead()) or time.monotonic() - changed > patience_s:
            if not _remove(path, current[1]):
                return None
            continue
        if holder is not None and not announced:
            announced = True
            clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
            say(f"waiting: process {holder.pid} on {holder.host} has been {what} since {clock}")
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)


def _examine(path: Path) -> tuple[int, int, bytes] | None:
    """Time of the last heartbeat, inode and content of the lock's file. It is opened, for only then NFS asks its server."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return status.st_mtime_ns, status.st_ino, file.read(4096)
    except FileNotFoundError:
        return None


def _holder(content: bytes) -> tuple[Process | None, int]:
    try:
        value = json.loads(content)
        return Process(value["host"], value["space"], value["pid"], value["started"]), int(value["since"])
    except (ValueError, KeyError, TypeError):  # killed between making and writing it
        return None, 0


def _remove(path: Path, inode: int) -> bool:
    """Remove a dead holder's file; one that another process has taken in the meantime is given back."""
    aside = path.with_name(f"{path.name}.{Process.current()}")
    try:
        path.rename(aside)
        if aside.stat().st_ino != inode:
            aside.rename(path)
        else:
            aside.unlink()
    except FileNotFoundError:
        pass  # another waiter was first
    except OSError:
        return False
    return True


def boot_id() -> str:
    """Linux's identifier of this machine's current boot: the same in every container on it, another after a restart (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did: field 22 of /proc/PID/stat (proc(5)); None if there is no such process, or only what is left of it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _pid_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def spawn_detached(argv: Sequence[str], env: Mapping[str, str], log: Path, *, blocked: Sequence[int] = ()) -> int:
    """Start a process in a session of its own, which goes on when this one ends; returns its number.

    Args:
        argv: the command; its first word is a path.
        log: gets its standard error; standard input is empty, standard output is dropped.
        blocked: signals that wait until the process unblocks them.

    Raises:
        OSError: it cannot be started.
    """
    pid = os.posix_spawn(
        argv[0],
        list(argv),
        dict(env),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        ],
        setsid=True,
        setsigmask=blocked,
    )

    def reap() -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

    threading.Thread(target=reap, name=f"reap {pid}", daemon=True).start()
    return pid


def run_captured(
    argv: Sequence[str], env: Mapping[str, str], timeout_s: float | None = None, *, new_session: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end without input; its output is text, with bytes that are not UTF-8 replaced.

    Args:
        new_session: the terminal's Ctrl-C does not reach the command.

    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it took longer than `timeout_s` seconds.
    """
    return subprocess.run(
        list(argv),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
        start_new_session=new_session,
    )
