"""Checks of Slurm: its commands, the partitions that jobs go to, account and QOS, what happens to a job at its end."""

from __future__ import annotations

import re
import shutil

from afina.doctor.target import Target
from afina.recipe.time_limit import minutes_in_words
from afina.site.finding import Finding
from afina.slurm.accounting import accounting_works
from afina.slurm.cluster import Partition
from afina.slurm.limits import job_size, refusal
from afina.slurm.query import queue_answers

__all__ = ["check_account", "check_after_the_end", "check_partitions", "check_slurm"]


def check_slurm(target: Target) -> list[Finding]:
    if not target.has_slurm:
        return [
            Finding(
                "slurm",
                "warning",
                "sbatch is not on PATH: no Slurm here",
                "call this on a login node of the cluster; `afina train` needs no Slurm",
            )
        ]
    missing = [
        c
        for c in ("squeue", "scontrol", "scancel", "srun", "sinfo")
        if not shutil.which(c, path=target.env.get("PATH"))
    ]
    if missing:
        return [
            Finding(
                "slurm",
                "failed",
                f"not on PATH: {', '.join(missing)}",
                "load Slurm's module, also in site.env: jobs need them too",
            )
        ]
    if not target.cluster.partitions:
        return [Finding("slurm", "failed", "sinfo does not answer", "is slurmctld up? `scontrol ping`")]
    version = target.cluster.config.get("SLURM_VERSION", "")
    found = [Finding("slurm", "ok", f"cluster {target.cluster.name or '?'}, Slurm {version or '?'}")]
    if not queue_answers():
        found.append(
            Finding(
                "squeue",
                "failed",
                "does not answer: states of runs would be UNKNOWN",
                "is slurmctld up? `scontrol ping`",
            )
        )
    found.append(
        Finding(
            "sacct", "ok", "works" if accounting_works() else "does not work here; afina reads run directories instead"
        )
    )
    return found


def check_partitions(target: Target) -> list[Finding]:
    asked = _asked(target)
    found = [Finding("partition", "ok", _described(x)) for x in asked if x.up]
    found += [
        Finding(
            "partition",
            "warning",
            f"{_described(x)}: it is not up",
            "jobs wait until it is; `sinfo -s` lists the others",
        )
        for x in asked
        if not x.up
    ]
    if target.plan is not None and target.cluster.partitions:
        job = job_size(target.plan, target.env)
        refused = refusal(job, target.cluster)
        if refused is not None:
            found.append(Finding("resources", "failed", *refused))
        else:
            memory = f", {job.mem_gb} GB" if job.mem_gb else ""
            found.append(
                Finding(
                    "resources",
                    "ok",
                    f"{job.nodes} × ({job.gpus} GPUs, {job.cpus} cores{memory}) for {minutes_in_words(job.minutes)}",
                )
            )
    elif (
        target.cluster.partitions
        and not asked
        and (name := {**target.env, **(target.site.sbatch if target.site else {})}.get("SBATCH_PARTITION"))
    ):
        known = ", ".join(x.name for x in target.cluster.partitions)
        found.append(Finding("partition", "failed", f"SBATCH_PARTITION={name}: no such partition", f"known: {known}"))
    return found


def _asked(target: Target) -> list[Partition]:
    """The partitions that jobs go to."""
    named = {**target.env, **(target.site.sbatch if target.site else {})}.get("SBATCH_PARTITION", "")
    if named:
        return [x for x in target.cluster.partitions if x.name in named.split(",")]
    return [target.cluster.default] if target.cluster.default else []


def _described(x: Partition) -> str:
    away = sum(kind.count for kind in x.nodes if kind.away)
    limit = "no time limit" if x.max_minutes is None else f"up to {minutes_in_words(x.max_minutes)}"
    gpus = f", {x.gpus_per_node} GPUs per node at most" if x.gpus_per_node else ", no GPUs"
    return f"{x.name}: {x.num_nodes} nodes{f' ({away} out of service)' if away else ''}{gpus}, {limit}"


def check_account(target: Target) -> list[Finding]:
    """The account and the QOS that jobs go under, against what accounting has of this user."""
    given = {**target.env, **(target.site.sbatch if target.site else {})}
    known = target.cluster.associations
    if not known:
        return []
    found = []
    accounts = sorted({a.account for a in known})
    account = given.get("SBATCH_ACCOUNT")
    if account and account.lower() not in [a.lower() for a in accounts]:
        return [Finding("account", "failed", f"SBATCH_ACCOUNT={account} is not yours", f"yours: {', '.join(accounts)}")]
    found.append(Finding("account", "ok", account or f"Slurm's default of yours: {', '.join(accounts)}"))
    qos = given.get("SBATCH_QOS")
    allowed = sorted({q for a in known if not account or a.account.lower() == account.lower() for q in a.qos})
    if qos and allowed and qos not in allowed:
        found.append(
            Finding("qos", "failed", f"SBATCH_QOS={qos} is not allowed for you", f"allowed: {', '.join(allowed)}")
        )
    elif qos:
        found.append(Finding("qos", "ok", qos))
    return found


def check_after_the_end(target: Target) -> list[Finding]:
    """What Slurm does with a job at its limit and at a preemption."""
    config = target.cluster.config
    if not config:
        return []
    found = []
    mode = config.get("PreemptMode", "OFF").upper()
    if "CANCEL" in mode:
        found.append(
            Finding(
                "preemption",
                "warning",
                f"PreemptMode={mode}: a preempted job is cancelled, not put back",
                "`afina submit RUN_DIR` goes on from its checkpoint",
            )
        )
    else:
        found.append(Finding("preemption", "ok", f"PreemptMode={mode}"))
    requeue = config.get("JobRequeue", "1")
    found.append(
        Finding(
            "requeue",
            "ok",
            "jobs may be put back into the queue"
            if requeue != "0"
            else "JobRequeue=0; the batch script asks for --requeue itself",
        )
    )
    wait = re.match(r"\d+", config.get("KillWait", ""))
    if wait and int(wait[0]) < 30:
        found.append(
            Finding(
                "kill wait",
                "warning",
                f"KillWait={wait[0]} s between TERM and KILL: too short for a large checkpoint",
                "the stop before the time limit needs no such grace; a preemption may cost what was done since the last save: train.save_minutes",
            )
        )
    elif wait:
        over = config.get("OverTimeLimit", "0 min")
        found.append(Finding("kill wait", "ok", f"KillWait={wait[0]} s, OverTimeLimit={over}"))
    return found
