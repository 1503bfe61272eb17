"""A run on this machine without a container: `afina train` and `afina resume`, each a process of its own.

Their start costs more than the whole training: in the suite's own tests they are forks of a process that has imported all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.live_run import LiveRun, Setting, freeze
from tests.faults.project import environment, overrides
from tests.processes import alive, descendants, signal_all

__all__ = ["NO_NETWORK", "OWN_NETWORK", "LocalRun", "needs_root"]

#: Command prefixes: a network namespace with only the loopback interface; one whose loopback is down.
OWN_NETWORK = ("unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
NO_NETWORK = ("unshare", "--net", "--")


class LocalRun(LiveRun):
    def __init__(
        self,
        place: Path,
        run: Path,
        setting: Setting,
        prefix: Sequence[str] = (),
        popen: type[subprocess.Popen[bytes]] = subprocess.Popen,
    ) -> None:
        """
        Args:
            prefix: of the first start's command (a network namespace of its own). Resumes have none: the network is back.
            popen: starts a command without a prefix.
        """
        self.place, self.run, self.setting, self.prefix, self.popen = place, run, setting, list(prefix), popen
        self.start_s = 5.0 if popen is subprocess.Popen else 1.0
        self.log = place / f"{run.name}.log"  # outside the small disk
        self._process: subprocess.Popen[bytes] | None = None

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
            return "the second start hung"
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error:")]
        return f"the second start ended with {code}" + (f" ({errors[0]})" if errors else "")

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

    def restore_network(self) -> None:
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
            return (subprocess.Popen if prefix else self.popen)(
                [*prefix, sys.executable, "-m", "afina", *words],
                cwd=self.place,
                env=environment(self.place),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _interface(self, state: str) -> None:
        # A rank's network namespace is the supervisor's, and exists while any process of the run does.
        pid = next(iter(self.ranks().values()), self.process.pid)
        subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "link", "set", "lo", state], check=True)


def needs_root(program: str) -> str | None:
    """Why this user may not use `program` (`unshare`, `mount`), or None."""
    return None if os.geteuid() == 0 else f"{program} needs root"
