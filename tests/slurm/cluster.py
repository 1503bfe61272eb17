"""A real Slurm cluster on one machine, in one folder: munged, MariaDB, slurmdbd, slurmctld and one slurmd per node.

Jobs are submitted and run as an ordinary user; slurmctld, slurmd and this module run as root. Everything a cluster
writes lies below its state folder (configuration, logs, spool, database, sockets, device files), so that clusters in
two folders are independent, and the system's own Slurm, munge and database are not touched.

    python tests/slurm/cluster.py up|down|status [--state DIR] [--proctrack linuxproc|cgroup] [--no-accounting]

Not covered: installation (install.sh), GPUs that compute (the devices are copies of /dev/null; only their allocation is
real), a network between the nodes, limits on a job's cores or memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import slurm_machine as machine
from slurm_settings import CGROUP_ROOT, ClusterError, Settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.processes import alive, environ, pids, signal_all

__all__ = ["TERMINAL", "Cluster", "ClusterError", "Process", "missing_programs"]

DEFAULT_STATE = Path("/tmp/afina-cluster")
LOCK = Path("/run/lock/afina-test-cluster.lock")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue")
ACCOUNTING_PROGRAMS = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacctmgr", "sacct")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# End states of a job, as squeue and scontrol name them.
TERMINAL = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)

Process = subprocess.CompletedProcess[str]


def missing_programs(accounting: bool = True) -> list[str]:
    """Slurm's programs that are not installed; install.sh installs them."""
    names = PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
    return [name for name in names if shutil.which(name, path=PATH) is None]


@dataclass
class Cluster(Settings):
    """A context manager that brings a cluster up and takes it down; its settings are the fields of `Settings`."""

    # ---------------------------------------------------------------- life

    def __enter__(self) -> Cluster:
        return self.up()

    def __exit__(self, *_: object) -> None:
        self.down()

    @classmethod
    def attach(cls, state: Path) -> Cluster:
        """The cluster that runs in this folder, with its settings."""
        file = Path(state) / "cluster.json"
        if not file.is_file():
            raise ClusterError(f"no cluster is up in {state}: python tests/slurm/cluster.py up --state {state}")
        return cls(**(json.loads(file.read_text()) | {"state": Path(state)}))

    def up(self) -> Cluster:
        """Start from scratch: removes what an earlier cluster left in this folder, processes and jobs included."""
        if os.geteuid() != 0:
            raise ClusterError("the test cluster needs root: slurmd becomes the user whose job it starts")
        if missing := missing_programs(self.accounting):
            raise ClusterError(f"not installed: {', '.join(missing)}; run tests/slurm/install.sh")
        self._account()
        self.down()
        if self.proctrack == "cgroup" and (reason := self.cgroup_unavailable()):
            raise ClusterError(reason)
        machine.make_host_name_resolve()
        self.make_folders()
        with LOCK.open("w") as lock:
            # Ports are probed now and bound a second later: one cluster at a time.
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.port = self.free_ports()
            self.write_configuration()
            try:
                self._start_munged()
                if self.accounting:
                    self._start_accounting()
                self._start_slurm()
            except BaseException as error:
                text = self.diagnose()
                self.down()
                if isinstance(error, ClusterError):
                    raise ClusterError(f"{error}\n{text}") from None
                raise
        return self

    def down(self) -> None:
        """Stop every process of this cluster and of its jobs, and unmount what lies below it. Logs stay. Idempotent."""
        if self._pid("slurmctld"):
            self.cancel_all()
        self._stop_slurm()
        for role in ("slurmdbd", "mariadbd", "munged"):
            self._stop(role)
        self._kill_leftovers()
        for mount in sorted(machine.mounts_below(self.state), reverse=True):
            subprocess.run(["umount", "--lazy", mount], check=True)
        for name in self._nodes_ever():
            for folder in CGROUP_ROOT.glob(f"*/slurm_{name}/uid_*/job_*"):
                # Only its own: another cluster may be about to use one that is empty.
                if int(folder.name.removeprefix("job_")) in self.job_ids:
                    machine.remove_empty_folders(folder)
        (self.state / "cluster.json").unlink(missing_ok=True)

    def restart(self, **changes: object) -> Cluster:
        """Cancel all jobs, then start slurmctld and slurmd anew with changed settings, e.g. `proctrack="cgroup"`,
        `accounting=False`, `grace_s=20`. Job ids go on; database and munge stay up."""
        known = {f.name for f in dataclasses.fields(self)} - {"state", "port", "user"}
        if unknown := changes.keys() - known:
            raise ClusterError(f"cannot change {sorted(unknown)}; known: {sorted(known)}")
        changed = dataclasses.replace(self, **changes)  # type: ignore[arg-type]
        if changed.proctrack == "cgroup" and (reason := self.cgroup_unavailable()):
            raise ClusterError(reason)
        self.cancel_all()
        self._stop_slurm()
        for name in changes:
            setattr(self, name, getattr(changed, name))
        self.write_configuration()
        if self.accounting and not self._pid("slurmdbd"):
            self._start_accounting()
        self._start_slurm()
        return self

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

    # ---------------------------------------------------------------- nodes

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

    # ---------------------------------------------------------------- commands and jobs

    def environment(self) -> dict[str, str]:
        """The ordinary user's login environment on this cluster; nothing of the caller's."""
        account = self._account()
        return {
            "HOME": account.pw_dir,
            "USER": account.pw_name,
            "LOGNAME": account.pw_name,
            "SHELL": account.pw_shell,
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(self.conf),
        }

    def run_as_user(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        input: str | None = None,
        timeout: float = 120,
        check: bool = False,
    ) -> Process:
        """Run a command as the ordinary user: a clean login-like environment plus `env`, in HOME unless `cwd`.

        Text in, text out. With `check`, a non-zero exit status raises ClusterError with the command's output.
        """
        account = self._account()
        result = subprocess.run(
            [str(word) for word in argv],
            env=self.environment() | dict(env or {}),
            cwd=cwd or account.pw_dir,
            input=input or "",
            capture_output=True,
            text=True,
            timeout=timeout,
            user=account.pw_uid,
            group=account.pw_gid,
            extra_groups=os.getgrouplist(account.pw_name, account.pw_gid),
            umask=0o022,
            start_new_session=True,
        )
        return _checked(result) if check else result

    def root(self, argv: Sequence[str], *, check: bool = True) -> Process:
        """Run one of Slurm's commands as root against this cluster, e.g. `scontrol update …`."""
        result = subprocess.run(argv, env=self._root_environment(), capture_output=True, text=True, timeout=60, cwd="/")
        return _checked(result) if check else result

    def sbatch(
        self,
        *argv: str | Path,
        script: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> int:
        """Submit as the ordinary user and return the job id; `script` is the batch script's text, instead of a file."""
        result = self.run_as_user(["sbatch", "--parsable", *argv], env=env, cwd=cwd, input=script, check=True)
        return int(result.stdout.strip().split(";")[0])

    def job(self, job_id: int | str) -> dict[str, str]:
        """`scontrol show job` as a mapping: JobState, Reason, Restarts, ExitCode, StartTime, NodeList, StdOut, …"""
        line = self.root(["scontrol", "--oneliner", "show", "job", str(job_id)]).stdout.splitlines()[0]
        return {key: value.strip() for key, value in re.findall(r"(\S+?)=(.*?)(?=\s+[\w/:.]+=|$)", line)}

    def wait(
        self, job_id: int | str, timeout: float = 120, *, states: Collection[str] = TERMINAL, restarts: int = 0
    ) -> str:
        """Wait until the job is in one of `states` (by default: has ended) after at least `restarts` restarts.

        Returns the state; after `timeout` seconds a ClusterError names the current one.
        """
        state = ""

        def reached() -> bool:
            nonlocal state
            job = self.job(job_id)
            state = f"{job['JobState']} (restarts {job['Restarts']}, reason {job['Reason']})"
            return job["JobState"] in states and int(job["Restarts"]) >= restarts

        try:
            self._wait_until(reached, timeout, f"job {job_id} is not {' or '.join(sorted(states))}")
        except ClusterError as error:
            raise ClusterError(f"{error}; it is {state}") from None
        return state.split()[0]

    def sacct(self, job_id: int | str, fields: str = "JobID,State,ExitCode,NodeList") -> list[dict[str, str]]:
        """Accounting's lines of a job, as the ordinary user: the job itself first, then its steps."""
        argv = ["sacct", "--jobs", str(job_id), "--parsable2", "--noheader", "--format", fields]
        lines = self.run_as_user(argv, check=True).stdout.splitlines()
        return [dict(zip(fields.split(","), line.split("|"), strict=True)) for line in lines]

    def cancel_all(self) -> None:
        """Cancel every job and wait until none is left, so that Slurm ends their processes."""

        def job_ids() -> list[str]:
            return self.root(["squeue", "--noheader", "--format=%A"], check=False).stdout.split()

        if ids := job_ids():
            self.root(["scancel", *sorted(set(ids))], check=False)
            with contextlib.suppress(ClusterError):
                self._wait_until(lambda: not job_ids(), self.kill_wait_s + 10, "jobs remain")

    def diagnose(self) -> str:
        """For failure messages: nodes, queue, the newest jobs and the end of each log."""
        parts = []
        for argv in (["sinfo", "-N", "-l"], ["squeue", "-l"], ["scontrol", "-o", "show", "job"]):
            if self._pid("slurmctld"):
                result = self.root(argv, check=False)
                parts.append(f"$ {' '.join(argv)}\n" + "\n".join((result.stdout + result.stderr).splitlines()[-20:]))
        for log in sorted((self.state / "log").glob("*")):
            if lines := log.read_text(errors="replace").splitlines()[-40:]:
                parts.append(f"--- {log}\n" + "\n".join(lines))
        return "\n\n".join(parts)

    # ---------------------------------------------------------------- daemons

    def _account(self) -> pwd.struct_passwd:
        try:
            return pwd.getpwnam(self.user)
        except KeyError:
            raise ClusterError(f"there is no user {self.user!r}; run tests/slurm/install.sh") from None

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


def _checked(result: Process) -> Process:
    if result.returncode != 0:
        command = " ".join(map(str, result.args))
        raise ClusterError(f"exit status {result.returncode}: {command}\n{result.stdout}{result.stderr}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE, help=f"the cluster's folder ({DEFAULT_STATE})")
    parser.add_argument("--proctrack", choices=["linuxproc", "cgroup"], default="linuxproc")
    parser.add_argument("--no-accounting", dest="accounting", action="store_false", help="no sacct")
    options = parser.parse_args(arguments)
    try:
        if options.command == "up":
            cluster = Cluster(options.state, proctrack=options.proctrack, accounting=options.accounting).up()
            print(f"up; as {cluster.user}: export SLURM_CONF={cluster.conf}")
        elif options.command == "down":
            Cluster(options.state).down()
        else:
            cluster = Cluster.attach(options.state)
            print(f"proctrack {cluster.proctrack}, accounting {cluster.accounting}, SLURM_CONF={cluster.conf}")
            print(cluster.root(["sinfo", "-N", "-l"]).stdout + cluster.root(["squeue", "-l"]).stdout)
    except ClusterError as error:
        print(f"cluster.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
