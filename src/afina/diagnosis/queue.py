"""Checks of Slurm: its commands, the partitions that jobs go to, account and QOS, the end of a job."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from afina.diagnosis.target import Target
from afina.site.finding import Finding
from afina.slurm.accounting import accounting_works
from afina.slurm.cluster import Partition
from afina.slurm.job_limits import default_qos, job_size, refusal
from afina.slurm.query import queue_answers
from afina.text import minutes_in_words, plural

__all__ = ["check_account", "check_after_the_end", "check_partitions", "check_slurm"]


def check_slurm(target: Target) -> Iterator[Finding]:
    if not target.has_slurm:
        remedy = "run this on a login node of the cluster; `afina train` needs no Slurm"
        yield Finding("slurm", "warning", "sbatch is not on PATH: no Slurm here", remedy)
        return
    commands = ("squeue", "scontrol", "scancel", "srun", "sinfo")
    missing = [name for name in commands if not shutil.which(name, path=target.env.get("PATH"))]
    if missing:
        remedy = "load Slurm's module, also in site.env: jobs need them too"
        yield Finding("slurm", "failed", f"not on PATH: {', '.join(missing)}", remedy)
        return
    if not target.cluster.partitions:
        yield Finding("slurm", "failed", "sinfo does not answer", "is slurmctld up? `scontrol ping`")
        return
    version = target.cluster.config.get("SLURM_VERSION", "")
    yield Finding("slurm", "ok", f"cluster {target.cluster.name or '?'}, Slurm {version or '?'}")
    if not queue_answers():
        message = "does not answer: states of runs would be UNKNOWN"
        yield Finding("squeue", "failed", message, "is slurmctld up? `scontrol ping`")
    works = "works" if accounting_works() else "does not work here; afina reads run directories instead"
    yield Finding("sacct", "ok", works)


def check_partitions(target: Target) -> Iterator[Finding]:
    """The partitions that jobs go to, and with a recipe whether one of them can run it."""
    partitions = target.cluster.partitions
    named = target.sbatch.get("SBATCH_PARTITION", "")
    if named:
        chosen = [partition for partition in partitions if partition.name in named.split(",")]
    else:
        chosen = [target.cluster.default] if target.cluster.default else []
    for partition in sorted(chosen, key=lambda partition: not partition.up):
        text = _described(partition)
        if partition.up:
            yield Finding("partition", "ok", text)
        else:
            remedy = "jobs wait until it is; `sinfo -s` lists the others"
            yield Finding("partition", "warning", f"{text}: it is not up", remedy)
    if target.plan is not None and partitions:
        size = job_size(target.plan, target.env)
        refused = refusal(size, target.cluster)
        memory = f", {size.mem_gb} GB" if size.mem_gb else ""
        text = f"{size.nodes} × ({plural(size.gpus, 'GPU')}, {plural(size.cpus, 'core')}{memory}) for {minutes_in_words(size.minutes)}"
        yield Finding("resources", "failed", *refused) if refused else Finding("resources", "ok", text)
    elif partitions and named and not chosen:
        known = ", ".join(partition.name for partition in partitions)
        yield Finding("partition", "failed", f"SBATCH_PARTITION={named}: no such partition", f"known: {known}")


def _described(partition: Partition) -> str:
    away = sum(kind.count for kind in partition.nodes if kind.away)
    minutes = partition.max_minutes
    limit = "no time limit" if minutes is None else f"up to {minutes_in_words(minutes)}"
    gpus = f"{plural(partition.gpus_per_node, 'GPU')} per node at most" if partition.gpus_per_node else "no GPUs"
    nodes = f"{plural(partition.num_nodes, 'node')}{f' ({away} out of service)' if away else ''}"
    return f"{partition.name}: {nodes}, {gpus}, {limit}"


def check_account(target: Target) -> Iterator[Finding]:
    """The account and the QOS of jobs, against this user's in Slurm's accounting."""
    known = target.cluster.associations
    if not known:
        return
    accounts = sorted({association.account for association in known})
    account, qos = target.sbatch.get("SBATCH_ACCOUNT", ""), target.sbatch.get("SBATCH_QOS")
    own = [association for association in known if association.account.lower() == account.lower()]
    if account and not own:
        message = f"SBATCH_ACCOUNT={account} is not yours"
        yield Finding("account", "failed", message, f"yours: {', '.join(accounts)}")
        return
    yield Finding("account", "ok", account or f"your default; you have: {', '.join(accounts)}")
    allowed = sorted({name for association in own or known for name in association.qos})
    if qos and allowed and qos not in allowed:
        message = f"SBATCH_QOS={qos} is not allowed for you"
        yield Finding("qos", "failed", message, f"allowed: {', '.join(allowed)}")
    elif used := qos or default_qos(target.cluster, account):
        known_qos = next((q for q in target.cluster.qos if q.name == used), None)
        limit = f", up to {minutes_in_words(known_qos.max_minutes)}" if known_qos and known_qos.max_minutes else ""
        yield Finding("qos", "ok", f"{used}{'' if qos else ' (your default)'}{limit}")


def check_after_the_end(target: Target) -> Iterator[Finding]:
    """Slurm's settings for a job's time limit and for preemption."""
    config = target.cluster.config
    if not config:
        return
    mode = config.get("PreemptMode", "OFF").upper()
    if "CANCEL" in mode:
        message = f"PreemptMode={mode}: a preempted job is cancelled, not requeued"
        yield Finding("preemption", "warning", message, "`afina submit RUN` resumes it from its checkpoint")
    else:
        yield Finding("preemption", "ok", f"PreemptMode={mode}")
    if config.get("JobRequeue", "1") != "0":
        yield Finding("requeue", "ok", "jobs may be requeued")
    else:
        yield Finding("requeue", "ok", "JobRequeue=0; the batch script asks for --requeue itself")
    wait = re.match(r"\d+", config.get("KillWait", ""))
    if wait and int(wait[0]) < 30:
        message = f"KillWait={wait[0]} s between TERM and KILL: too short for a large checkpoint"
        remedy = "the stop before the time limit does not need it; a preemption may cost the work since the last save: train.save_minutes"
        yield Finding("kill wait", "warning", message, remedy)
    elif wait:
        over = config.get("OverTimeLimit", "0 min")
        yield Finding("kill wait", "ok", f"KillWait={wait[0]} s, OverTimeLimit={over}")
