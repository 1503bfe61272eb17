"""A run on this machine without a container: `afina train` and `afina resume`, each a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.live import Live, Setting, alive, descendants, freeze, signal_all
from tests.faults.place import environment, overrides

__all__ = ["NO_NETWORK", "OWN_NETWORK", "HereRun", "may"]

#: In a network of its own, whose only interface is up; and in one without any.
OWN_NETWORK = ("unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
NO_NETWORK = ("unshare", "--net", "--")


class HereRun(Live):
    """Args: prefix: words before the first start's command (a network of its own). Resumes have none: it has come back."""

    def __init__(self, place: Path, run: Path, setting: Setting, prefix: Sequence[str] = ()) -> None:
        self.place, self.run, self.setting, self.prefix = place, run, setting, list(prefix)
        self.log = place / f"{run.name}.log"  # not on a disk that fills up or fails
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[int] = set()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    def start(self, changes: Mapping[str, Any], limit_min: int = 0) -> None:
        argv = ["train", str(self.place / "recipe.yaml"), "--run", str(self.run), *overrides(changes)]
        self._process = self._afina(self.prefix, *argv, "--num-processes", str(self.setting.processes))
        self.until((self.run / "plan.json").is_file, "the run directory")

    def resume(self) -> None:
        self.mark()
        self._process = self._afina([], "resume", str(self.run))

    def ended(self) -> str | None:
        code = self.process.poll()
        if code is None:
            return None
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def second(self) -> str:
        log = self.place / f"{self.run.name}.second.log"
        second = self._afina([], "resume", str(self.run), log=log)
        try:
            code = second.wait(timeout=120)
        except subprocess.TimeoutExpired:
            signal_all([second.pid, *descendants(second.pid)], signal.SIGKILL)
            second.wait()
            return "the second one hung"
        said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error:")]
        return f"the second one ended with {code}" + (f" ({said[0]})" if said else "")

    def signal_host(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def signal_step(self, number: signal.Signals) -> None:
        signal_all(descendants(self.process.pid), number)

    def kill_everything(self) -> None:
        pids = [self.process.pid, *descendants(self.process.pid), *self.processes()]
        freeze(pids)
        signal_all(pids, signal.SIGKILL)
        self.process.wait()

    def cut_network(self) -> None:
        self._interface("down")

    def mend_network(self) -> None:
        self._interface("up")

    def clean_up(self) -> None:
        if self._process is None:
            return
        for _ in range(100):
            pids = [pid for pid in (self.process.pid, *descendants(self.process.pid), *self.processes()) if alive(pid)]
            if not pids:
                break
            signal_all(pids, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)
        self.process.wait()

    def _afina(self, prefix: Sequence[str], *words: str, log: Path | None = None) -> subprocess.Popen[bytes]:
        with (log or self.log).open("ab") as out:
            return subprocess.Popen(
                [*prefix, sys.executable, "-m", "afina.cli", *words],
                cwd=self.place,
                env=environment(self.place),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _interface(self, state: str) -> None:
        # The rank's network, not the supervisor's: the same, and it is there as long as any process of the run is.
        pid = next(iter(self.ranks().values()), self.process.pid)
        subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "link", "set", "lo", state], check=True)


def may(program: str) -> str | None:
    """Why this user cannot use `program` (`unshare`, `mount`), or None."""
    return None if os.geteuid() == 0 else f"{program} needs root"
