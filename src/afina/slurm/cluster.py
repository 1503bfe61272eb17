"""What a cluster says of itself, read from the words of sinfo, scontrol and sacctmgr; and what it will never run.

Pure: the commands are run by `afina.slurm`. A field that cannot be read is None, and nothing is concluded from it. Nodes count
whatever state they are in: one that is down today may be back tomorrow, and Slurm keeps the job until then.

Not covered: features and constraints, reservations, limits of a user or an account, licences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from afina.errors import nearest
from afina.run.plan import Plan

__all__ = [
    "ASSOC_ARGV",
    "QOS_ARGV",
    "SINFO_ARGV",
    "Ask",
    "Association",
    "Cluster",
    "Nodes",
    "Partition",
    "Qos",
    "ask_of",
    "limit_of",
    "minutes",
    "parse_associations",
    "parse_config",
    "parse_partitions",
    "parse_qos",
    "refusal",
    "words_of_minutes",
]

#: `--exact`: nodes that differ are told apart, instead of the least of them with a plus.
SINFO_ARGV = ("sinfo", "--exact", "--noheader", "--format=%P|%a|%l|%s|%D|%c|%m|%G|%T")
ASSOC_ARGV = ("sacctmgr", "--noheader", "--parsable2", "show", "assoc", "format=Cluster,Account,Partition,QOS,DefaultQOS,MaxWall")  # fmt: skip
QOS_ARGV = ("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=Name,MaxWall,Flags")

_MANY = 10**9
#: States in which a node takes no job now, in sinfo's long names; a `*` means that it does not respond.
_AWAY = ("down", "drain", "fail", "maint", "power", "unknown", "reserved", "no_respond")


@dataclass(frozen=True)
class Nodes:
    """`count` nodes of one kind: cores, memory in MB, GPUs and their types, and the state that sinfo names."""

    count: int
    cpus: int | None
    mem_mb: int | None
    gpus: int
    gpu_types: tuple[str, ...]
    state: str

    @property
    def away(self) -> bool:
        return self.state.endswith("*") or self.state.lower().startswith(_AWAY)


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
    """What could be learnt. Empty tuples and mappings where a command was missing, refused or silent."""

    partitions: tuple[Partition, ...] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    associations: tuple[Association, ...] = ()
    qos: tuple[Qos, ...] = ()

    @property
    def name(self) -> str | None:
        return self.config.get("ClusterName")

    def partition(self, name: str) -> Partition | None:
        return next((p for p in self.partitions if p.name == name), None)

    @property
    def default(self) -> Partition | None:
        return next((p for p in self.partitions if p.default), None)


@dataclass(frozen=True)
class Ask:
    """What a plan asks of Slurm, per node where it is per node. `partitions` empty: the default one."""

    nodes: int
    gpus: int
    cpus: int
    mem_gb: int | None
    minutes: int
    partitions: tuple[str, ...] = ()
    qos: str = ""


def ask_of(plan: Plan, env: Mapping[str, str]) -> Ask:
    """Args: env: what sbatch would see, the site's `SBATCH_*` aside."""
    geometry, resources = plan.geometry, plan.recipe.resources
    given = {**env, **plan.site.sbatch}
    return Ask(
        nodes=geometry.nodes,
        gpus=geometry.gpus_per_node,
        cpus=resources.cpus_per_gpu * geometry.processes_per_node,
        mem_gb=resources.mem_gb,
        minutes=resources.time,
        partitions=tuple(p for p in given.get("SBATCH_PARTITION", "").split(",") if p),
        qos=given.get("SBATCH_QOS", ""),
    )


def refusal(ask: Ask, cluster: Cluster) -> tuple[str, str] | None:
    """Why no partition that is asked for will ever run this, and what to ask for instead; None where one may.

    Several partitions are as in sbatch: the job goes to whichever takes it. Nothing is refused that is not known.
    """
    known = cluster.partitions
    if not known:
        return None
    names = ask.partitions or ((cluster.default.name,) if cluster.default else ())
    found = [p for p in known if p.name in names]
    if ask.partitions and not found:
        hint = nearest(ask.partitions[0], [p.name for p in known])
        return (
            f"SBATCH_PARTITION={','.join(ask.partitions)}: this cluster has no such partition",
            f"{hint + ' ' if hint else ''}known: {', '.join(p.name for p in known)}",
        )
    qos = next((q for q in cluster.qos if q.name == ask.qos), None)
    if qos is not None and qos.max_minutes is not None and ask.minutes > qos.max_minutes:
        return (
            f"{words_of_minutes(ask.minutes)} are more than the {words_of_minutes(qos.max_minutes)} that QOS {qos.name} allows",
            f"ask for less (`--time {qos.max_minutes}`; a run goes on after a requeue), or another SBATCH_QOS",
        )
    said = [why for partition in found if (why := _against(ask, partition, qos)) is not None]
    if not found or len(said) < len(found):
        return None
    others = [p.name for p in known if p not in found and p.up and _against(ask, p, qos) is None]
    elsewhere = f", or SBATCH_PARTITION={others[0]}, which has it" if others else ""
    message, remedy = said[0]
    return message, remedy + elsewhere


def limit_of(ask: Ask, cluster: Cluster) -> int | None:
    """The longest time in minutes that a partition that is asked for allows; None where there is no limit or none is known."""
    names = ask.partitions or ((cluster.default.name,) if cluster.default else ())
    limits = [p.max_minutes for p in cluster.partitions if p.name in names]
    known = [limit for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None


def _against(ask: Ask, partition: Partition, qos: Qos | None) -> tuple[str, str] | None:
    """What a partition has against a job."""
    flags = {flag.lower() for flag in qos.flags} if qos is not None else set()
    # A QOS that is not known here may lift the partition's limits.
    lifted = (ask.qos and qos is None) or "partitiontimelimit" in flags
    where = f"partition {partition.name}"
    if partition.max_minutes is not None and ask.minutes > partition.max_minutes and not lifted:
        return (
            f"{words_of_minutes(ask.minutes)} are more than the {words_of_minutes(partition.max_minutes)} that {where} allows",
            f"ask for less (`--time {partition.max_minutes}`; a run goes on after a requeue)",
        )
    if partition.max_nodes is not None and ask.nodes > partition.max_nodes and not (ask.qos and qos is None):
        return (
            f"{ask.nodes} nodes are more than the {partition.max_nodes} that {where} allows in one job",
            f"ask for fewer: `--nodes {partition.max_nodes}`",
        )
    needs: tuple[tuple[int, str, Callable[[Nodes], int], str], ...] = (
        (ask.gpus, "GPUs", lambda kind: kind.gpus, "--gpus-per-node"),
        (ask.cpus, "cores", lambda kind: kind.cpus or _MANY, "resources.cpus_per_gpu"),
        ((ask.mem_gb or 0) * 1024, "MB", lambda kind: kind.mem_mb or _MANY, "resources.mem_gb"),
    )
    if not partition.nodes:
        return None
    for wanted, what, of, key in needs:
        most = max(of(kind) for kind in partition.nodes)
        if wanted > most:
            has = f"{most // 1024} GB of memory" if what == "MB" else f"{most} {what}" if most else f"no {what}"
            asked = f"{ask.mem_gb} GB of memory" if what == "MB" else f"{wanted} {what}"
            return f"{asked} per node are asked for, and no node of {where} has more than {has}", f"lower {key}"
    fit = sum(kind.count for kind in partition.nodes if all(of(kind) >= wanted for wanted, _, of, _ in needs))
    if fit < ask.nodes:
        together = f"{ask.gpus} GPUs, {ask.cpus} cores" + (f" and {ask.mem_gb} GB" if ask.mem_gb else "")
        return (
            f"{ask.nodes} nodes with {together} each are asked for, and {where} has {fit} of them",
            f"ask for fewer nodes, or for less per node: {'; '.join(dict.fromkeys(map(_described, partition.nodes)))}",
        )
    return None


def _described(kind: Nodes) -> str:
    memory = f", {kind.mem_mb // 1024} GB" if kind.mem_mb is not None else ""
    gpus = f", {kind.gpus} GPUs{' (' + ', '.join(kind.gpu_types) + ')' if kind.gpu_types else ''}" if kind.gpus else ""
    return f"{kind.count} × {kind.cpus or '?'} cores{memory}{gpus}"


# -- reading ----------------------------------------------------------------------------------------------------------


def parse_partitions(said: str) -> tuple[Partition, ...]:
    """The answer of `SINFO_ARGV`; lines that are not understood are left out."""
    found: dict[str, Partition] = {}
    for line in said.splitlines():
        fields = [f.strip() for f in line.split("|")]
        if len(fields) != 9 or not fields[0]:
            continue
        name, state, limit, sizes, count, cpus, memory, gres, nodes_state = fields
        kinds = _kinds(count, cpus, memory, gres, nodes_state)
        name, default = name.rstrip("*"), name.endswith("*")
        before = found.get(name)
        most = sizes.rpartition("-")[2]
        found[name] = Partition(
            name=name,
            default=default,
            up=state.lower() == "up",
            max_minutes=minutes(limit),
            max_nodes=int(most) if most.isdigit() else None,
            nodes=(*(before.nodes if before else ()), *kinds),
        )
    return tuple(found.values())


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


def parse_config(said: str) -> dict[str, str]:
    """The answer of `scontrol show config` as a mapping; `AsOf` is the first line's time."""
    found: dict[str, str] = {}
    for line in said.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found.setdefault(name.strip(), value.strip())
        elif match := re.match(r"Configuration data as of (\S+)", line):
            found["AsOf"] = match[1]
    return found


def parse_associations(said: str, cluster: str | None) -> tuple[Association, ...]:
    """The answer of `ASSOC_ARGV`, of this cluster only where its name is known."""
    found = []
    for line in said.splitlines():
        fields = [f.strip() for f in line.split("|")]
        if len(fields) != 6 or not fields[1] or (cluster and fields[0] and fields[0] != cluster):
            continue
        _, account, partition, qos, default, wall = fields
        found.append(Association(account, partition, tuple(q for q in qos.split(",") if q), default, minutes(wall)))
    return tuple(dict.fromkeys(found))


def parse_qos(said: str) -> tuple[Qos, ...]:
    """The answer of `QOS_ARGV`."""
    rows = [[f.strip() for f in line.split("|")] for line in said.splitlines()]
    return tuple(
        Qos(row[0], minutes(row[1]), tuple(f for f in row[2].split(",") if f)) for row in rows if len(row) == 3
    )


def minutes(text: str) -> int | None:
    """Minutes of a limit as Slurm prints it (`4:00:00`, `1-00:00:00`, `30:00`), rounded down; None: none, or not readable."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minute, _ = (int(g or 0) for g in match.groups())
    return days * 1440 + hours * 60 + minute


def words_of_minutes(number: float) -> str:
    """`90 min` up to two hours, then `2 h 30 min`, from two days on `3 days 4 h`; to the minute."""
    whole = round(number)
    if whole < 120:
        return f"{whole} min"
    days, hours, rest = (
        (whole // 1440, whole % 1440 // 60, whole % 60) if whole >= 2880 else (0, whole // 60, whole % 60)
    )
    parts = ((days, "days"), (hours, "h"), (rest, "min"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count)
