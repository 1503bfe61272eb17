"""One attempt at a time works in a run directory: the lease says which, and that it is alive.

Locks of shared file systems cannot be relied on (some are local to a node, some are refused). The lease is a file that
rank 0 of the attempt replaces every few seconds. Who finds a lease asks whether its holder lives: on the same machine by
its process, from elsewhere by watching the file. A requeued job takes the lease of its own earlier start at once. Who finds
his lease in other hands has been given up for dead (a node that lost the network, say) and must not write any more.

The host looks at it too: a process that was halted (SIGSTOP) cannot notice that itself. `patience_s` says how long to wait.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from afina.errors import ClaimedError
from afina.processes import started
from afina.run.directory import RunDir
from afina.worker.survival.stop import Watchdog

__all__ = ["Lease"]

BEAT_S = 10.0
#: A lease that does not change for so long has no living holder. More than two beats and an NFS client's cache.
DEAD_S = 45.0


class Lease:
    """Held from `take` until the process ends; a clean end gives it back with `release`.

    Attributes:
        lost: another attempt has taken it.
        patience: seconds that the host waits for the next beat, beyond a few beats; at first for the start-up.
    """

    def __init__(self, run: RunDir, attempt: str) -> None:
        self.path = run.path / "lease.json"
        self.attempt = attempt
        self.lost = False
        self.patience: Callable[[], float] = lambda: Watchdog.FIRST_S
        self._beats = 0
        self._writing = threading.Lock()
        self._over = threading.Event()

    def take(self, wait_s: float = DEAD_S) -> None:
        """Take the lease; waits up to `wait_s` seconds to see whether a holder on another machine lives.

        Raises:
            ClaimedError: it lives.
        """
        holder = self._read()
        if holder is not None and not self._is_over(holder):
            if not _here(holder):
                print(
                    f"afina: attempt {holder['attempt']} on {holder['host']} may still be running; looking for {wait_s:.0f} s",
                    flush=True,
                )
                ends = time.monotonic() + wait_s
                while time.monotonic() < ends and self._read() == holder:
                    time.sleep(1.0)
            if _here(holder) or self._read() not in (holder, None):
                raise ClaimedError(
                    f"{self.path.parent}: attempt {holder['attempt']} is running in this directory (process {holder['pid']} on {holder['host']})",
                    "wait for it, or stop it: touch the file `stop` in the run directory, or `scancel` its job",
                    cause="claimed",
                )
        self._write()
        time.sleep(0.05)
        if not self._mine():
            raise ClaimedError(
                f"{self.path.parent}: another attempt began at the same moment", "let one of them run", cause="claimed"
            )
        threading.Thread(target=self._keep, name="afina-lease", daemon=True).start()

    def expect(self, patience: Callable[[], float]) -> None:
        """Let the host wait as long as `patience` says from now on."""
        self.patience = patience
        self._write()

    def release(self) -> None:
        self._over.set()
        if self._mine():
            self.path.unlink(missing_ok=True)

    def _keep(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                if not self._mine():
                    self.lost = True
                    return
                self._write()
            except OSError:
                continue  # a full disk or a server that is away: the next beat may come through

    def _write(self) -> None:
        with self._writing:
            self._beats += 1
            record = {"attempt": self.attempt, "beats": self._beats, "patience_s": int(self.patience()), **_self()}
            aside = self.path.with_name(f".lease.{self.attempt}.{os.getpid()}")
            aside.write_text(json.dumps(record), encoding="utf-8")
            os.replace(aside, self.path)

    def _read(self) -> dict[str, Any] | None:
        try:
            value = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _mine(self) -> bool:
        held = self._read()
        return held is None or {"attempt": self.attempt, **_self()}.items() <= held.items()

    def _is_over(self, holder: dict[str, Any]) -> bool:
        """Whether the holder is known to have ended: an earlier start of this job, or a process of this machine that is gone."""
        job = self.attempt.rpartition(".")[0]
        if job and holder["attempt"].rpartition(".")[0] == job and holder["attempt"] != self.attempt:
            return True
        return _here(holder) and started(holder["pid"]) != holder["started"]


def _self() -> dict[str, Any]:
    return {"host": platform.node(), "boot": _boot(), "pid": os.getpid(), "started": started(os.getpid())}


def _here(holder: dict[str, Any]) -> bool:
    return bool(holder["boot"] == _boot())


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
