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
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import slurm_machine as machine
from slurm_daemons import PATH, Daemons, Process, checked
from slurm_settings import CGROUP_ROOT, ClusterError

__all__ = ["TERMINAL", "Cluster", "ClusterError", "Process", "missing_programs"]

DEFAULT_STATE = Path("/tmp/afina-cluster")
LOCK = Path("/run/lock/afina-test-cluster.lock")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue")
ACCOUNTING_PROGRAMS = ("mariadbd", "mariadb-install-db", "slurmdbd", "sacctmgr", "sacct")

# End states of a job, as squeue and scontrol name them.
TERMINAL = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)


def missing_programs(accounting: bool = True) -> list[str]:
    """Slurm's programs that are not installed; install.sh installs them."""
    names = PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
    return [name for name in names if shutil.which(name, path=PATH) is None]


@dataclass
class Cluster(Daemons):
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
        return checked(result) if check else result

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

    def _account(self) -> pwd.struct_passwd:
        try:
            return pwd.getpwnam(self.user)
        except KeyError:
            raise ClusterError(f"there is no user {self.user!r}; run tests/slurm/install.sh") from None


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
