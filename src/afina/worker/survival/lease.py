"""Lease: one attempt at a time works in a run directory, and the file `lease.json` shows which one, and that it is alive.

Locks of shared file systems are unreliable (some are local to a node, some are refused). Rank 0 of the attempt replaces the
file every few seconds instead. A new attempt checks whether the holder lives: on the same machine by its process, from
elsewhere by watching the file. A requeued job takes the lease of its own earlier start at once. An attempt that finds its
lease taken was presumed dead (its node lost the network, say) and must not write any more.

The host checks it too, because a halted process (SIGSTOP) cannot notice that itself: `patience_s` is how long it waits.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from afina.errors import ClaimedError
from afina.files import read_json
from afina.processes import Process, boot_id
from afina.run.directory import RunDir
from afina.worker.survival.watchdog import Watchdog

__all__ = ["Lease"]

BEAT_S = 10.0
#: A lease that does not change for so long has no living holder. More than two beats and an NFS client's cache.
DEAD_S = 45.0


class Lease:
    """Held from `take` until the process ends; a clean end returns it with `release`.

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
        if holder is not None:
            self._check_dead(holder, wait_s)
        self._write()
        time.sleep(0.05)
        if not self._is_mine():
            raise ClaimedError(
                f"{self.path.parent}: another attempt started at the same moment",
                "let one of them run",
                cause="claimed",
            )
        threading.Thread(target=self._keep, name="afina-lease", daemon=True).start()

    def expect(self, patience: Callable[[], float]) -> None:
        """Let the host wait `patience()` seconds for a beat from now on."""
        self.patience = patience
        self._write()

    def release(self) -> None:
        self._over.set()
        if self._is_mine():
            self.path.unlink(missing_ok=True)

    def _check_dead(self, holder: dict[str, Any], wait_s: float) -> None:
        dead = self._is_dead(holder)
        if dead is None:
            print(
                f"afina: attempt {holder['attempt']} on {holder['host']} may still be running; watching it for {wait_s:.0f} s",
                flush=True,
            )
            ends = time.monotonic() + wait_s
            while time.monotonic() < ends and self._read() == holder:
                time.sleep(1.0)
            dead = self._read() in (holder, None)
        if not dead:
            raise ClaimedError(
                f"{self.path.parent}: attempt {holder['attempt']} is running in this directory (process {holder['pid']} on {holder['host']})",
                "wait for it, or stop it: touch the file `stop` in the run directory, or `scancel` its job",
                cause="claimed",
            )

    def _is_dead(self, holder: dict[str, Any]) -> bool | None:
        """True if the holder is an earlier start of this job, or a dead process. None: not visible from here."""
        job = self.attempt.rpartition(".")[0]
        if job and holder["attempt"].rpartition(".")[0] == job and holder["attempt"] != self.attempt:
            return True
        if holder["boot"] != boot_id():
            return None
        here = Process.current()
        # Leases of afina 0.1 name no namespace.
        process = Process(holder["host"], holder.get("space", here.space), holder["pid"], holder["started"] or 0)
        return process.is_dead()

    def _keep(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                if not self._is_mine():
                    self.lost = True
                    return
                self._write()
            except OSError:
                continue  # a full disk or an unreachable server: the next beat may succeed

    def _write(self) -> None:
        with self._writing:
            self._beats += 1
            record = {"attempt": self.attempt, "beats": self._beats, "patience_s": int(self.patience()), **_self()}
            aside = self.path.with_name(f".lease.{self.attempt}.{os.getpid()}")
            aside.write_text(json.dumps(record), encoding="utf-8")
            os.replace(aside, self.path)

    def _read(self) -> dict[str, Any] | None:
        return read_json(self.path) or None

    def _is_mine(self) -> bool:
        holder = self._read()
        return holder is None or {"attempt": self.attempt, **_self()}.items() <= holder.items()


def _self() -> dict[str, Any]:
    return {"boot": boot_id(), **asdict(Process.current())}
