"""Allocation: what Slurm really gave to this process, and where its node meets the others.

The only place that reads Slurm's variables, and those that `slurm/job.sh` and the supervisor set. It is read once from the
environment, written to the attempt's `env.json`, and handed on as a value. Not covered: the variables of torchrun (RANK, …).
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import platform
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Allocation", "interface_to", "is_loopback", "socket_interface"]

_SIOCGIFADDR = 0x8915  # netdevice(7)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The allocation of a process; without Slurm, this machine.

    Attributes:
        job_id: of this job; a task of an array has one of its own.
        array_job_id, array_task_id: of an array's task.
        restart: how many times Slurm has put the job back into the queue.
        launched_by: `slurm` (job.sh, submitit) or `local` (`afina train`); None if a worker was started by hand.
        attempt: the attempt's name, `<job>.<restart>` or `local-<n>`.
        nodes: of this job step.
        node: this node's number in the step. Read it in the task: in the batch script every node would be number 0.
        node_name: as Slurm knows this node.
        node_names: all nodes, in their order; empty without Slurm.
        gpus: on this node; None if Slurm does not say.
        memory_gb: per node; None if Slurm does not say.
        cpus: cores of this task; None if Slurm does not say. Where Slurm binds no cores, affinity shows the whole node.
        num_processes: asked for on this machine by `afina resume --num-processes`.
        head, port: where the nodes meet.
        deadline: when Slurm ends the job, in seconds since the epoch; None without a limit.
        local_disk: the node's folder for temporary files.
        stage: the folder to which model and data are copied first (`AFINA_STAGE`); None to read them where they are.
        slurm: Slurm's own variables about the job, for the record.
    """

    job_id: str | None = None
    array_job_id: str | None = None
    array_task_id: str | None = None
    restart: int = 0
    launched_by: str | None = None
    attempt: str = "local-1"
    nodes: int = 1
    node: int = 0
    node_name: str = ""
    node_names: tuple[str, ...] = ()
    gpus: int | None = None
    memory_gb: float | None = None
    cpus: int | None = None
    num_processes: int | None = None
    head: str | None = None
    port: int | None = None
    deadline: float | None = None
    local_disk: Path = Path("/tmp")
    stage: Path | None = None
    slurm: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Allocation:
        """Read it from these variables, by default the process's own."""
        env = os.environ if env is None else env
        local_disk = Path(env.get("SLURM_TMPDIR") or env.get("TMPDIR") or "/tmp")
        stage = env.get("AFINA_STAGE", "")
        return cls(
            job_id=env.get("SLURM_JOB_ID") or None,
            array_job_id=env.get("SLURM_ARRAY_JOB_ID") or None,
            array_task_id=env.get("SLURM_ARRAY_TASK_ID") or None,
            restart=_number(env, "SLURM_RESTART_COUNT") or 0,
            launched_by=env.get("AFINA_LAUNCH") or None,
            attempt=env.get("AFINA_ATTEMPT") or "local-1",
            nodes=_number(env, "SLURM_STEP_NUM_NODES") or _number(env, "SLURM_NNODES") or 1,
            node=_number(env, "SLURM_NODEID") or 0,
            node_name=env.get("SLURMD_NODENAME") or platform.node(),
            node_names=tuple(env.get("AFINA_NODES", "").split()),
            gpus=_number(env, "SLURM_GPUS_ON_NODE"),
            memory_gb=_memory_gb(env),
            cpus=_number(env, "SLURM_CPUS_PER_TASK"),
            num_processes=_number(env, "AFINA_PROCESSES"),
            head=env.get("AFINA_HEAD") or None,
            port=_number(env, "AFINA_PORT"),
            deadline=float(env.get("AFINA_DEADLINE") or 0) or None,
            local_disk=local_disk,
            stage=None if stage in ("", "0") else local_disk if stage == "1" else Path(stage),
            slurm={
                name: value
                for name, value in env.items()
                if (name.startswith("SLURM_JOB") and name != "SLURM_JOB_COMMENT")
                or name in ("SLURM_NNODES", "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT")
            },
        )

    @property
    def in_job(self) -> bool:
        """Launched by a batch job: Slurm's numbers are the run's. `afina train` inside an allocation is not."""
        return self.launched_by == "slurm" and self.job_id is not None

    @property
    def job(self) -> str | None:
        """The job as its submission names it: `123`, or `123_4` for a task of an array."""
        return f"{self.array_job_id}_{self.array_task_id or ''}" if self.array_job_id else self.job_id

    def cores(self) -> int:
        """Cores that this process may use."""
        bound = len(os.sched_getaffinity(0))
        return min(bound, self.cpus or bound)

    def to_json(self) -> dict[str, Any]:
        """The values for `env.json`, without those that are not known."""
        known = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, ()) and k != "slurm"}
        return {name: str(value) if isinstance(value, Path) else value for name, value in known.items()}


def _memory_gb(env: Mapping[str, str]) -> float | None:
    """From Slurm's MB: per node, or per core."""
    node, core = _number(env, "SLURM_MEM_PER_NODE"), _number(env, "SLURM_MEM_PER_CPU")
    cores = _number(env, "SLURM_CPUS_ON_NODE") or 0
    size = node or (core or 0) * cores
    return round(size / 1024, 2) if size else None


def _number(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name, "")
    return int(value) if value.isdigit() else None


def socket_interface(allocation: Allocation, env: Mapping[str, str]) -> dict[str, str]:
    """The network interface to the other nodes, where this node's own name is its loopback address (127.0.1.1, as Debian writes).

    Of several nodes. gloo listens on the address of the host's name, which is then reachable from nowhere; NCCL gets the same interface. What the site
    has set stays.
    """
    if env.get("GLOO_SOCKET_IFNAME") or not is_loopback(socket.gethostname()):
        return {}
    others = [allocation.head, *(name for name in allocation.node_names if name != allocation.node_name)]
    name = next(filter(None, map(interface_to, filter(None, others))), None)
    if name is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": env.get("NCCL_SOCKET_IFNAME") or name}


def is_loopback(host: str) -> bool:
    """True where every IPv4 address of the name is this machine's loopback."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError:
        return False
    return bool(addresses) and all(address.startswith("127.") for address in addresses)


def interface_to(host: str) -> str | None:
    """The interface through which packets to `host` leave; None for the loopback, and where there is no route.

    Not covered: IPv6 alone, several addresses of one interface beside its first.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of a datagram socket: only looks up the route
            address = probe.getsockname()[0]
            if address.startswith("127."):
                return None
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                except OSError:  # an interface without an address
                    continue
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    except OSError:
        return None
    return None
