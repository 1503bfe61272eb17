"""Facts about a cluster: partitions, nodes, accounts and QOS, from sinfo, scontrol and sacctmgr.

A field that cannot be read is None. Nodes count whatever their state: one that is down today may be back tomorrow, and Slurm
keeps the job until then.

Not covered: features and constraints, reservations, limits of a user or an account, licences.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from afina.recipe.time_limit import parse_seconds
from afina.slurm.client import try_command
from afina.text import plural

__all__ = [
    "Association",
    "Cluster",
    "Nodes",
    "Partition",
    "Qos",
    "parse_associations",
    "parse_config",
    "parse_partitions",
    "parse_qos",
    "read_cluster",
    "read_config",
]

#: `--exact`: one line for each kind of node, instead of the smallest of them with a plus.
_SINFO = ("sinfo", "--exact", "--noheader", "--format=%P|%a|%l|%s|%D|%c|%m|%G|%T")
_CONFIG = ("scontrol", "show", "config")
_SACCTMGR = ("sacctmgr", "--noheader", "--parsable2", "show")
_ASSOCIATIONS = (*_SACCTMGR, "assoc", "format=Cluster,Account,Partition,QOS,DefaultQOS,MaxWall")
_QOS = (*_SACCTMGR, "qos", "format=Name,MaxWall,Flags")

#: States in which a node takes no job now, in sinfo's long names; a `*` means that it does not respond.
_AWAY = ("down", "drain", "fail", "maint", "power", "unknown", "reserved", "no_respond")


@dataclass(frozen=True)
class Nodes:
    """`count` nodes of one kind: cores, memory in MB, GPUs and their types, and their state as sinfo names it."""

    count: int
    cpus: int | None
    mem_mb: int | None
    gpus: int
    gpu_types: tuple[str, ...]
    state: str

    @property
    def away(self) -> bool:
        return self.state.endswith("*") or self.state.lower().startswith(_AWAY)

    def __str__(self) -> str:
        memory = f", {self.mem_mb // 1024} GB" if self.mem_mb is not None else ""
        types = f" ({', '.join(self.gpu_types)})" if self.gpu_types else ""
        cores = plural(self.cpus, "core") if self.cpus else "? cores"
        gpus = f", {plural(self.gpus, 'GPU')}{types}" if self.gpus else ""
        return f"{self.count} × {cores}{memory}{gpus}"


@dataclass(frozen=True)
class Partition:
    """A partition. `max_minutes` None: no limit, or none that could be read."""

    name: str
    default: bool
    up: bool
    max_minutes: int | None
    max_nodes: int | None
    nodes: tuple[Nodes, ...]

    @property
    def num_nodes(self) -> int:
        return sum(kind.count for kind in self.nodes)

    @property
    def gpus_per_node(self) -> int:
        return max((kind.gpus for kind in self.nodes), default=0)


@dataclass(frozen=True)
class Association:
    """An account of this user, as accounting has it; `max_minutes` of a job under it."""

    account: str
    partition: str = ""
    qos: tuple[str, ...] = ()
    default_qos: str = ""
    max_minutes: int | None = None


@dataclass(frozen=True)
class Qos:
    name: str
    max_minutes: int | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """One cluster. Tuples and mappings are empty where a command was missing, refused or did not answer."""

    partitions: tuple[Partition, ...] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    associations: tuple[Association, ...] = ()
    qos: tuple[Qos, ...] = ()

    @property
    def name(self) -> str | None:
        return self.config.get("ClusterName")

    @property
    def default(self) -> Partition | None:
        return next((p for p in self.partitions if p.default), None)


def read_cluster(*, accounting: bool = True) -> Cluster:
    """Ask the cluster with four short commands; what one does not answer stays empty.

    Args:
        accounting: also ask for this user's accounts and for the QOS, where a cluster has accounting.
    """
    partitions = parse_partitions(try_command(_SINFO) or "")
    if not partitions:
        return Cluster()
    config = read_config()
    if not accounting:
        return Cluster(partitions, config)
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())
    associations = parse_associations(try_command([*_ASSOCIATIONS, f"user={user}"]) or "", config.get("ClusterName"))
    return Cluster(partitions, config, associations, parse_qos(try_command(_QOS) or ""))


def read_config() -> dict[str, str]:
    """Slurm's configuration, see `parse_config`; empty where slurmctld does not answer."""
    return parse_config(try_command(_CONFIG) or "")


def parse_partitions(answer: str) -> tuple[Partition, ...]:
    """Partitions from sinfo's answer; lines that are not understood are left out."""
    partitions: dict[str, Partition] = {}
    for line in answer.splitlines():
        fields = [f.strip() for f in line.split("|")]
        if len(fields) != 9 or not fields[0]:
            continue
        name, state, limit, sizes, count, cpus, memory, gres, nodes_state = fields
        kinds = _kinds(count, cpus, memory, gres, nodes_state)
        name, default = name.rstrip("*"), name.endswith("*")
        before = partitions.get(name)
        most = sizes.rpartition("-")[2]
        partitions[name] = Partition(
            name=name,
            default=default,
            up=state.lower() == "up",
            max_minutes=_minutes(limit),
            max_nodes=int(most) if most.isdigit() else None,
            nodes=(*(before.nodes if before else ()), *kinds),
        )
    return tuple(partitions.values())


def _kinds(count: str, cpus: str, memory: str, gres: str, state: str) -> tuple[Nodes, ...]:
    if not count.isdigit() or count == "0":
        return ()
    gpus, types = _gpus(gres)
    return (Nodes(int(count), _number(cpus), _number(memory), gpus, types, state),)


def _number(text: str) -> int | None:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None


def _gpus(gres: str) -> tuple[int, tuple[str, ...]]:
    """`gpu:a100:4(S:0-1),gpu:v100:2,mps:100` is 6 GPUs of two types."""
    total, types = 0, []
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, *rest = entry.strip().split(":")
        if kind != "gpu":
            continue
        total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
        types += [word for word in rest if not word.isdigit()]
    return total, tuple(dict.fromkeys(types))


def parse_config(answer: str) -> dict[str, str]:
    """The answer of `scontrol show config`; `AsOf` is the time of its first line."""
    config: dict[str, str] = {}
    for line in answer.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            config.setdefault(name.strip(), value.strip())
        elif match := re.match(r"Configuration data as of (\S+)", line):
            config["AsOf"] = match[1]
    return config


def parse_associations(answer: str, cluster: str | None) -> tuple[Association, ...]:
    """This user's accounts from sacctmgr's answer; those of this cluster only, where its name is known."""
    associations = []
    for line in answer.splitlines():
        fields = [f.strip() for f in line.split("|")]
        if len(fields) != 6 or not fields[1] or (cluster and fields[0] and fields[0] != cluster):
            continue
        _, account, partition, qos, default, wall = fields
        associations.append(
            Association(account, partition, tuple(q for q in qos.split(",") if q), default, _minutes(wall))
        )
    return tuple(dict.fromkeys(associations))


def parse_qos(answer: str) -> tuple[Qos, ...]:
    """QOS from sacctmgr's answer."""
    rows = [[f.strip() for f in line.split("|")] for line in answer.splitlines()]
    return tuple(
        Qos(row[0], _minutes(row[1]), tuple(f for f in row[2].split(",") if f)) for row in rows if len(row) == 3
    )


def _minutes(text: str) -> int | None:
    """Minutes of a limit, rounded down; None: no limit, or not readable."""
    seconds = parse_seconds(text)
    return None if seconds is None else int(seconds // 60)
