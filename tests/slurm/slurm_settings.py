"""The settings of a test cluster, and what they become: its folders, device files and configuration files.

It starts nothing. The texts come from the `*.conf.in` beside this file; what is between two @ is replaced.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from slurm_machine import first_free_block, short_host_name

__all__ = ["CGROUP_ROOT", "ClusterError", "Settings"]

TEMPLATES = Path(__file__).resolve().parent
CGROUP_ROOT = Path("/sys/fs/cgroup")
FIRST_PORT, PORTS_PER_CLUSTER, JOBS_PER_CLUSTER, MAX_CLUSTERS = 17000, 20, 1000, 50
# A socket's path may have 107 bytes, and "/run/mariadb.sock" is added to the state folder's.
MAX_STATE_LENGTH = 80


class ClusterError(RuntimeError):
    """The test cluster could not do what was asked; the text holds the command, its output or the remedy."""


@dataclass
class Settings:
    """What one cluster is: where it lies and how Slurm is configured. Times in seconds.

    `grace_s` is the GraceTime of the partition `gpu`: on preemption the tasks, not the batch script, get TERM that
    long before the job is killed and requeued. `requeue_delay_s` is the pause before a requeued job starts again (120
    in production). `constrain_memory` gives each job a memory cgroup with its limit; `enforce` is AccountingStorageEnforce. `gpu_type` names the GPUs (`gpu:a100:2`); with `job_requeue` 0 no job may be put back. `slurmctld_parameters` is passed on, e.g. "preempt_send_user_signal".
    """

    state: Path
    _: KW_ONLY
    proctrack: str = "linuxproc"
    accounting: bool = True
    constrain_memory: bool = False
    enforce: str = ""
    nodes: int = 2
    cpus: int = 4
    gpus: int = 2
    gpu_type: str = ""
    job_requeue: int = 1
    mem_mb: int = 16000
    user: str = field(default_factory=lambda: os.environ.get("AFINA_TEST_USER", "researcher"))
    requeue_delay_s: int = 5
    kill_wait_s: int = 10
    grace_s: int = 0
    node_timeout_s: int = 20
    slurmctld_parameters: str = ""
    port: int = 0

    def __post_init__(self) -> None:
        self.state = Path(self.state).resolve()
        if len(str(self.state)) > MAX_STATE_LENGTH or re.search(r"[\s#,=]", str(self.state)):
            raise ClusterError(f"the state folder's path must be short and without spaces, # , or =: {self.state}")
        if self.proctrack not in ("linuxproc", "cgroup"):
            raise ClusterError(f"proctrack must be linuxproc or cgroup, not {self.proctrack!r}")

    @property
    def node_names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    @property
    def conf(self) -> Path:
        return self.state / "slurm.conf"

    @property
    def dbd_port(self) -> int:
        return self.port + PORTS_PER_CLUSTER - 1

    @property
    def job_ids(self) -> range:
        """Those of this cluster; no other that is up has one of them."""
        first = 1 + (self.port - FIRST_PORT) // PORTS_PER_CLUSTER * JOBS_PER_CLUSTER
        return range(first, first + JOBS_PER_CLUSTER)

    @staticmethod
    def free_ports() -> int:
        """A block of ports for one cluster; its place among them also keeps their job ids apart."""
        start = first_free_block(FIRST_PORT, PORTS_PER_CLUSTER, MAX_CLUSTERS)
        if start is None:
            raise ClusterError(f"no free block of {PORTS_PER_CLUSTER} ports from {FIRST_PORT} on")
        return start

    def make_folders(self) -> None:
        """Empty folders. The user must reach the sockets, so all parents must be open; munged checks who owns them."""
        self.state.mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o755)
        for old in self.state.iterdir():
            if old.name in {"mysql", "munge", "run", "log", "slurmctld", "dev"} or old.name.startswith("spool-"):
                shutil.rmtree(old)
        for name in ("munge", "run", "log", "slurmctld", "dev", "mysql", *(f"spool-{n}" for n in self.node_names)):
            (self.state / name).mkdir(mode=0o700 if name == "munge" else 0o755)
        # mariadbd runs as its own user and makes its socket, pid file and log there. Sticky, for munged's sake.
        for name in ("run", "log"):
            (self.state / name).chmod(0o1777)
        shutil.chown(self.state / "mysql", "mysql" if self.accounting else "root")
        for i in range(self.gpus):
            device = self.state / "dev" / f"fakegpu{i}"
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            device.chmod(0o666)

    def write_configuration(self) -> None:
        host = short_host_name()
        accounting = ["AccountingStorageType=accounting_storage/none"]
        if self.accounting:
            accounting = [
                "AccountingStorageType=accounting_storage/slurmdbd",
                "AccountingStorageHost=127.0.0.1",
                f"AccountingStoragePort={self.dbd_port}",
                # Under auth/munge the "password" is the socket of the munged to use; AuthInfo does not cover this one.
                f"AccountingStoragePass={self.state}/run/munge.sock",
                "AccountingStorageTRES=gres/gpu",
                *([f"AccountingStorageEnforce={self.enforce}"] if self.enforce else []),
            ]
        kind = f"{self.gpu_type}:" if self.gpu_type else ""
        resources = f"CPUs={self.cpus} RealMemory={self.mem_mb} Gres=gpu:{kind}{self.gpus}"
        values = {
            "HOST": host,
            "STATE": self.state,
            "SLURMCTLD_PORT": self.port,
            "SLURMDBD_PORT": self.dbd_port,
            "FIRST_JOB_ID": self.job_ids[0],
            "PROCTRACK": self.proctrack,
            "TASK": "cgroup" if self.constrain_memory else "none",
            "CONSTRAIN_MEMORY": "yes" if self.constrain_memory else "no",
            "REQUEUE_DELAY": self.requeue_delay_s,
            "JOB_REQUEUE": self.job_requeue,
            "KILL_WAIT": self.kill_wait_s,
            "GRACE": self.grace_s,
            "NODE_TIMEOUT": self.node_timeout_s,
            "SLURMCTLD_PARAMETERS": self.slurmctld_parameters and f"SlurmctldParameters={self.slurmctld_parameters}",
            "ACCOUNTING": "\n".join(accounting),
            "CGROUP_ROOT": CGROUP_ROOT,
            "NODES": "\n".join(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.port + i} {resources}"
                for i, name in enumerate(self.node_names, start=1)
            ),
        }
        for template in sorted(TEMPLATES.glob("*.conf.in")):
            text = re.sub(r"@([A-Z_]+)@", lambda m: str(values[m[1]]), template.read_text())
            self._write(template.name.removesuffix(".in"), text, 0o600 if "slurmdbd" in template.name else 0o644)
        devices = [f"{self.state}/dev/fakegpu{i}" for i in range(self.gpus)]
        typed = f" Type={self.gpu_type}" if self.gpu_type else ""
        gres = [f"NodeName={name} Name=gpu{typed} File={device}\n" for name in self.node_names for device in devices]
        self._write("gres.conf", "".join(gres), 0o644)

    def _write(self, name: str, text: str, mode: int) -> None:
        path = self.state / name
        path.touch()
        path.chmod(mode)
        path.write_text(text)
