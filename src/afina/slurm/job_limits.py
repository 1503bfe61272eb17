"""Refuse jobs that no partition will ever run: their size against the limits of partitions, nodes and QOS.

What is not known is not refused. Several partitions are as in sbatch: the job goes to any that takes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from afina.errors import SlurmError, nearest
from afina.run.plan import Plan
from afina.slurm.cluster import Cluster, Nodes, Partition, Qos, read_cluster
from afina.text import minutes_in_words, plural

__all__ = ["JobSize", "check_possible", "default_qos", "job_size", "limit_of", "refusal"]

_UNKNOWN = 10**9
#: A problem and its remedy.
Refusal = tuple[str, str]


@dataclass(frozen=True)
class JobSize:
    """The size of a plan's job; GPUs, cores and memory per node. `partitions` empty: the default one."""

    nodes: int
    gpus: int
    cpus: int
    mem_gb: int | None
    minutes: int
    partitions: tuple[str, ...] = ()
    qos: str = ""
    account: str = ""


def check_possible(plan: Plan) -> Cluster:
    """Refuse a plan that no requested partition will ever run; what Slurm does not tell is not refused.

    Returns: the facts about the cluster.

    Raises:
        SlurmError: the time, nodes, GPUs, cores or memory requested, and what there is.
    """
    cluster = read_cluster()
    refused = refusal(job_size(plan, os.environ), cluster)
    if refused is not None:
        raise SlurmError(*refused)
    return cluster


def job_size(plan: Plan, env: Mapping[str, str]) -> JobSize:
    """The size of a plan's job.

    Args:
        env: what sbatch would see besides the site's `SBATCH_*`.
    """
    geometry, resources = plan.geometry, plan.recipe.resources
    variables = {**env, **plan.site.sbatch}
    return JobSize(
        nodes=geometry.nodes,
        gpus=geometry.gpus_per_node,
        cpus=resources.cpus_per_gpu * geometry.processes_per_node,
        mem_gb=resources.mem_gb,
        minutes=resources.time,
        partitions=tuple(p for p in variables.get("SBATCH_PARTITION", "").split(",") if p),
        qos=variables.get("SBATCH_QOS", ""),
        account=variables.get("SBATCH_ACCOUNT", ""),
    )


def refusal(size: JobSize, cluster: Cluster) -> Refusal | None:
    """Why none of the requested partitions will ever run this, and what to request instead; None where one may."""
    known = cluster.partitions
    if not known:
        return None
    requested = _requested(size, cluster)
    if size.partitions and not requested:
        hint = nearest(size.partitions[0], [p.name for p in known])
        return (
            f"SBATCH_PARTITION={','.join(size.partitions)}: this cluster has no such partition",
            f"{hint + ' ' if hint else ''}known: {', '.join(p.name for p in known)}",
        )
    named = size.qos or default_qos(cluster, size.account)
    qos = next((q for q in cluster.qos if q.name == named), None)
    if qos is not None and qos.max_minutes is not None and size.minutes > qos.max_minutes:
        return (
            f"{minutes_in_words(size.minutes)} are more than the {minutes_in_words(qos.max_minutes)} that QOS {qos.name} allows",
            f"ask for less (`--time {qos.max_minutes}`; a run continues after a requeue), or another SBATCH_QOS",
        )
    refusals = [refused for p in requested if (refused := _refused_by(p, size, qos)) is not None]
    if not requested or len(refusals) < len(requested):
        return None
    others = [p.name for p in known if p not in requested and p.up and _refused_by(p, size, qos) is None]
    message, remedy = refusals[0]
    return message, remedy + (f", or SBATCH_PARTITION={others[0]}, which has it" if others else "")


def default_qos(cluster: Cluster, account: str = "") -> str:
    """The QOS of a job that names none: the default of this user's association; empty where that is not known or not one."""
    own = [a for a in cluster.associations if not account or a.account.lower() == account.lower()]
    defaults = {a.default_qos for a in own if not a.partition}
    return defaults.pop() if len(defaults) == 1 else ""


def limit_of(size: JobSize, cluster: Cluster) -> int | None:
    """The longest time in minutes that a requested partition allows; None: no limit, or none known."""
    limits = [p.max_minutes for p in _requested(size, cluster)]
    known = [limit for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None


def _requested(size: JobSize, cluster: Cluster) -> list[Partition]:
    names = size.partitions or ((cluster.default.name,) if cluster.default else ())
    return [p for p in cluster.partitions if p.name in names]


def _refused_by(partition: Partition, size: JobSize, qos: Qos | None) -> Refusal | None:
    flags = {flag.lower() for flag in qos.flags} if qos is not None else set()
    # A QOS that is not known here may lift the partition's limits.
    unknown_qos = bool(size.qos) and qos is None
    where = f"partition {partition.name}"
    limit = partition.max_minutes
    if limit is not None and size.minutes > limit and not unknown_qos and "partitiontimelimit" not in flags:
        return (
            f"{minutes_in_words(size.minutes)} are more than the {minutes_in_words(limit)} that {where} allows",
            f"ask for less (`--time {limit}`; a run continues after a requeue)",
        )
    if partition.max_nodes is not None and size.nodes > partition.max_nodes and not unknown_qos:
        return (
            f"{plural(size.nodes, 'node is', 'nodes are')} more than the {partition.max_nodes} that {where} allows in one job",
            f"ask for fewer: `--nodes {partition.max_nodes}`",
        )
    return _too_large(partition, size, where) if partition.nodes else None


def _too_large(partition: Partition, size: JobSize, where: str) -> Refusal | None:
    """No node, or not enough nodes, have the GPUs, cores and memory of the job."""
    needs: tuple[tuple[int, str, Callable[[Nodes], int], str], ...] = (
        (size.gpus, "GPUs", lambda kind: kind.gpus, "--gpus-per-node"),
        (size.cpus, "cores", lambda kind: kind.cpus or _UNKNOWN, "resources.cpus_per_gpu"),
        ((size.mem_gb or 0) * 1024, "MB", lambda kind: kind.mem_mb or _UNKNOWN, "resources.mem_gb"),
    )
    for wanted, unit, amount, key in needs:
        most = max(amount(kind) for kind in partition.nodes)
        if wanted > most:
            has = f"{most // 1024} GB of memory" if unit == "MB" else f"{most} {unit}" if most else f"no {unit}"
            requested = f"{size.mem_gb} GB of memory" if unit == "MB" else f"{wanted} {unit}"
            return f"{requested} per node are requested, and no node of {where} has more than {has}", f"lower {key}"
    fit = sum(kind.count for kind in partition.nodes if all(amount(kind) >= wanted for wanted, _, amount, _ in needs))
    if fit >= size.nodes:
        return None
    together = f"{plural(size.gpus, 'GPU')}, {plural(size.cpus, 'core')}" + (
        f" and {size.mem_gb} GB" if size.mem_gb else ""
    )
    return (
        f"{size.nodes} nodes with {together} each are requested, and {where} has {fit} of them",
        f"ask for fewer nodes, or for less per node: {'; '.join(dict.fromkeys(map(str, partition.nodes)))}",
    )
