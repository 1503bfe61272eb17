"""The daemons of a test cluster: started, stopped, killed; its nodes, and the processes that jobs leave. As root."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import slurm_machine as machine
from slurm_settings import CGROUP_ROOT, ClusterError, Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.processes import alive, environ, pids, signal_all

__all__ = ["Daemons", "Process", "checked"]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Process = subprocess.CompletedProcess[str]


def checked(result: Process) -> Process:
    if result.returncode != 0:
        command = " ".join(map(str, result.args))
        raise ClusterError(f"exit status {result.returncode}: {command}\n{result.stdout}{result.stderr}")
    return result


class Daemons(Settings):
    """Slurm's daemons, munge and the database, with the settings of a cluster."""

    @staticmethod
    def cgroup_unavailable(hierarchy: str = "freezer") -> str | None:
        """Why Slurm's cgroup plugins cannot run here, or None. Slurm 22.05 needs cgroup v1, mounted and writable."""
        procs = CGROUP_ROOT / hierarchy / "cgroup.procs"
        if not procs.is_file():
            return f"Slurm needs the cgroup v1 {hierarchy} hierarchy, and {procs.parent} is not mounted"
        return None if os.access(procs, os.W_OK) else f"Slurm's cgroup plugins: {procs} is not writable"

    def daemon_pids(self) -> dict[str, int]:
        """The daemons that run now: munged, mariadbd, slurmdbd, slurmctld, slurmd-n1, slurmd-n2."""
        roles = ["munged", "mariadbd", "slurmdbd", "slurmctld", *(f"slurmd-{name}" for name in self.node_names)]
        return {role: pid for role in roles if (pid := self._pid(role))}

    def kill_slurmd(self, node: str, *, with_jobs: bool = False) -> None:
        """SIGKILL a node's slurmd. Its jobs run on, as on a real node; `with_jobs` kills them too: a power cut.

        slurmctld notices after about `node_timeout_s`: node down, jobs requeued. If the slurmd is back before that,
        slurmctld believes that a job less than 20 seconds old still runs, for ever; `fail_node` avoids both.
        """
        pid = self._pid(self._slurmd(node))
        if not pid:
            raise ClusterError(f"slurmd {node} is not running")
        signal_all([pid], signal.SIGKILL)
        self._wait_until(lambda: not alive(pid), 10, f"slurmd {node} outlives SIGKILL")
        if with_jobs:
            self._kill_leftovers(node)

    def fail_node(self, node: str) -> None:
        """A power cut that slurmctld learns of at once instead of after `node_timeout_s`."""
        self.kill_slurmd(node, with_jobs=True)

        def is_down() -> bool:
            # A late answer of the node would bring it back into service: check again.
            self.root(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=Not responding"])
            time.sleep(0.3)
            return self.node_state(node).startswith("down")

        self._wait_until(is_down, 10, f"node {node} does not stay down")

    def start_slurmd(self, node: str, *, wait: bool = True) -> None:
        """Start a node's slurmd again and wait until the node takes jobs."""
        self._daemon(self._slurmd(node), ["slurmd", "-N", node])
        if wait:
            self._wait_for_nodes([node])

    def node_state(self, node: str) -> str:
        """The state of scontrol in lower case: idle, mixed, allocated, down, down+not_responding, mixed+completing, …"""
        # Not sinfo without -N: it reported a node that was down as "mixed" for ten seconds (22.05.8).
        line = self.root(["scontrol", "--oneliner", "show", "node", node]).stdout
        return re.search(r"\sState=(\S+)", line)[1].lower()  # type: ignore[index]

    def root(self, argv: Sequence[str], *, check: bool = True) -> Process:
        """Run one of Slurm's commands as root against this cluster, e.g. `scontrol update …`."""
        result = subprocess.run(argv, env=self._root_environment(), capture_output=True, text=True, timeout=60, cwd="/")
        return checked(result) if check else result

    def _slurmd(self, node: str) -> str:
        if node not in self.node_names:
            raise ClusterError(f"no node {node!r}; there are {', '.join(self.node_names)}")
        return f"slurmd-{node}"

    def _nodes_ever(self) -> list[str]:
        """The nodes with a log here: an earlier cluster in this folder may have had more."""
        return [log.stem.removeprefix("slurmd-") for log in (self.state / "log").glob("slurmd-*.log")]

    def _root_environment(self) -> dict[str, str]:
        return {
            "PATH": PATH,
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(self.conf),
            # Where MariaDB's client library, and so slurmdbd, looks for the server of "localhost".
            "MYSQL_UNIX_PORT": str(self.state / "run" / "mariadb.sock"),
        }

    def _daemon(self, role: str, argv: list[str]) -> None:
        """Start a program that daemonises itself. Its output goes to a file: it would hold a pipe open."""
        with (self.state / "log" / f"{role}.out").open("ab") as out:
            status = subprocess.run(
                argv, env=self._root_environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/"
            ).returncode
        if status != 0:
            raise ClusterError(f"{role} did not start (exit status {status}): {' '.join(argv)}")
        self._wait_until(lambda: bool(self._pid(role)), 20, f"{role} wrote no pid file")

    def _pid(self, role: str) -> int:
        """The daemon's process id, or 0 if it does not run: a pid file may be stale and its number taken by another."""
        file = self.state / "run" / f"{role}.pid"
        try:
            pid = int(file.read_text())
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
        except (OSError, ValueError):
            return 0
        return pid if comm == role.partition("-")[0] and alive(pid) else 0

    def _stop(self, *roles: str) -> None:
        """TERM, and KILL after 15 seconds."""
        running = [pid for role in roles if (pid := self._pid(role))]
        signal_all(running, signal.SIGTERM)
        try:
            self._wait_until(lambda: not any(map(alive, running)), 15, "daemons outlive SIGTERM")
        except ClusterError:
            signal_all(running, signal.SIGKILL)

    def _stop_slurm(self) -> None:
        self._stop("slurmctld", *(f"slurmd-{name}" for name in self._nodes_ever()))

    def _start_munged(self) -> None:
        run, log = self.state / "run", self.state / "log"
        key = self.state / "munge" / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(128))
        argv = ["munged", f"--key-file={key}", f"--seed-file={key.parent}/seed", f"--log-file={log}/munged.log"]
        self._daemon("munged", [*argv, f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"])

    def _start_accounting(self) -> None:
        data, run, log = self.state / "mysql", self.state / "run", self.state / "log"
        if not (data / "mysql").is_dir():
            argv = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=mysql", "--skip-test-db"]
            self.root([*argv, "--auth-root-authentication-method=socket"])
        # mariadbd stays in the foreground: setsid gives it a session of its own, so that a Ctrl-C does not reach it.
        server = ["mariadbd", "--no-defaults", f"--datadir={data}", "--user=mysql", "--skip-networking"]
        server += [f"--socket={run}/mariadb.sock", f"--pid-file={run}/mariadbd.pid", f"--log-error={log}/mariadbd.log"]
        server += ["--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900"]
        if not self._pid("mariadbd"):  # a second one would wait for the first one's lock
            self._daemon("mariadbd", ["setsid", "--fork", *server])
        self._wait_until((run / "mariadb.sock").is_socket, 30, "mariadbd opened no socket")
        self._daemon("slurmdbd", ["slurmdbd"])
        self._wait_until(lambda: machine.listens(self.dbd_port), 60, "slurmdbd does not listen")
        listed = self.root(["sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=cluster"]).stdout
        if "afina" not in listed.split():
            self.root(["sacctmgr", "--immediate", "add", "cluster", "afina"])

    def _start_slurm(self) -> None:
        self._daemon("slurmctld", ["slurmctld"])
        self._wait_until(lambda: machine.listens(self.port), 30, "slurmctld does not listen")
        for name in self.node_names:
            self.start_slurmd(name, wait=False)
        self._wait_for_nodes(self.node_names)
        settings = dataclasses.asdict(self) | {"state": str(self.state)}
        (self.state / "cluster.json").write_text(json.dumps(settings, indent=1))

    def _wait_for_nodes(self, names: list[str]) -> None:
        def ready() -> bool:
            states = [self.node_state(name) for name in names]
            return all(re.match("(idle|mixed|allocated)", s) and "not_responding" not in s for s in states)

        self._wait_until(ready, 60, f"{', '.join(names)} did not become usable")

    def _wait_until(self, reached: Callable[[], bool], timeout: float, failure: str) -> None:
        deadline = time.monotonic() + timeout
        while not reached():
            if time.monotonic() > deadline:
                raise ClusterError(f"{failure} after {timeout:g} s")
            time.sleep(0.2)

    def _kill_leftovers(self, node: str | None = None) -> None:
        """SIGKILL takes a moment, and a process may fork meanwhile: repeat until none is left."""

        def none_left() -> bool:
            left = self._leftovers(node)
            signal_all(left, signal.SIGKILL)
            return not left

        self._wait_until(none_left, 10, "processes of jobs outlive SIGKILL")

    def _leftovers(self, node: str | None = None) -> list[int]:
        """Processes of this cluster's jobs (of one node), found without the daemons that started them.

        A slurmstepd holds the log of its slurmd open; a task carries SLURM_CONF and its node's name in its
        environment, whatever it has become since.
        """
        logs = {str(self.state / "log" / f"slurmd-{name}.log") for name in ([node] if node else self._nodes_ever())}
        daemons = {self._pid(f"slurmd-{name}") for name in self._nodes_ever()}
        found = []
        for pid in pids():
            if pid in daemons:
                continue
            variables = environ(pid)
            named = variables.get("SLURMD_NODENAME")
            is_task = variables.get("SLURM_CONF") == str(self.conf) and named and node in (None, named)
            if is_task or (machine.comm(pid).startswith("slurmstepd") and logs.intersection(machine.open_files(pid))):
                found.append(pid)
        return [pid for pid in found if pid != os.getpid()]
