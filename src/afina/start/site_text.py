"""The site file that `afina init` proposes: bash, with the facts about the cluster as comments. Pure."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

from afina.slurm.cluster import Cluster, Nodes, Partition
from afina.start.find_machine import Machine
from afina.text import minutes_in_words

__all__ = ["site_text", "usable_partition"]


def usable_partition(cluster: Cluster) -> Partition | None:
    """The partition to propose: the default one if it has GPUs or none has, else the first that is up and has some."""
    default = cluster.default or (cluster.partitions[0] if cluster.partitions else None)
    if default is None or default.gpus_per_node:
        return default
    return next((p for p in cluster.partitions if p.up and p.gpus_per_node), default)


def site_text(machine: Machine, cluster: Cluster) -> str:
    """The site file, for bash to read."""
    scratch = machine.scratch
    plain = re.fullmatch(r"[\w./@+-]+", scratch, re.ASCII)
    lines = [
        "# Where afina runs, proposed by `afina init` from this machine and its cluster. bash reads it, on the login node and in",
        "# the job; docs/site.md describes it (`afina --help` names the folder). It names your account: keep it out of git.",
        "",
        f"# {machine.scratch_why}",
        f': "${{AFINA_SCRATCH:={scratch}}}"'
        if plain
        else f'[ -n "${{AFINA_SCRATCH:-}}" ] || AFINA_SCRATCH={shlex.quote(scratch)}',
        "",
        f"# {machine.image_why}",
        f"AFINA_IMAGE={shlex.quote(machine.image) if machine.image else ''}",
        f"AFINA_RUNTIME={machine.runtime}",
    ]
    if machine.module:
        lines += [
            "",
            f"# {machine.runtime} is not on PATH; this module provides it.",
            f"module load {machine.module}",
        ]
    lines += [*_partitions(cluster), *_accounts(cluster)]
    lines += [
        "",
        "# Further folders for jobs, SRC[:DST[:OPTIONS]]; scratch, recipe, data and model are always bound.",
        "# AFINA_BIND=/data:/data:ro",
    ]
    return "\n".join(lines) + "\n"


def _partitions(cluster: Cluster) -> list[str]:
    chosen = usable_partition(cluster)
    if chosen is None:
        return []
    return [
        "",
        "# The partitions (sinfo); * is the default one:",
        *(f"#   {_described(p)}" for p in cluster.partitions),
        f"{'# ' if chosen.default else ''}SBATCH_PARTITION={chosen.name}",
    ]


def _described(p: Partition) -> str:
    limit = "no time limit" if p.max_minutes is None else f"up to {minutes_in_words(p.max_minutes)}"
    kinds: dict[Nodes, int] = {}
    for kind in p.nodes:
        key = replace(kind, count=0, state="")
        kinds[key] = kinds.get(key, 0) + kind.count
    nodes = "; ".join(str(replace(kind, count=count)) for kind, count in kinds.items())
    return f"{p.name}{'*' if p.default else ''}: {limit}; {nodes}{'' if p.up else ' (not up)'}"


def _accounts(cluster: Cluster) -> list[str]:
    accounts = list(dict.fromkeys(a.account for a in cluster.associations))
    if not accounts:
        return []
    lines = [
        "",
        f"# Your accounts (sacctmgr): {', '.join(accounts)}",
        f"{'# ' if len(accounts) == 1 else ''}SBATCH_ACCOUNT={accounts[0]}",
    ]
    qos = list(dict.fromkeys(q for a in cluster.associations for q in a.qos))
    return [*lines, f"# QOS that they allow: {', '.join(qos)}", f"# SBATCH_QOS={qos[0]}"] if qos else lines
