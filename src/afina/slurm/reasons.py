"""Why a job waits, in words that a researcher understands, and what to do about it.

squeue gives a reason as one word of Slurm's (`QOSMaxGRESPerUser`). The words here are of Slurm 22.05 to 25.05, from its manual
(squeue, "JOB REASON CODES") and its source; what is not in the table is shown as Slurm says it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Waiting", "explain"]

_QUEUE = "nothing: Slurm starts it when its turn comes; a shorter --time fits into gaps sooner"
_PARTITION = "`sinfo -o '%P %a %l %D'` shows the partitions; set SBATCH_PARTITION in site.env and submit again"
_LIMITS = "`sacctmgr show qos format=name,maxtrespu,maxjobspu,maxwall` shows the limits"

#: Slurm's word (a pattern for all of it) -> what it means, what to do. `{job}` stands for the job's number.
_REASONS: tuple[tuple[str, str, str], ...] = (
    ("None|WaitingForScheduling", "Slurm has not looked at it yet", "nothing: look again in a minute"),
    ("Priority", "jobs with a higher priority come first", _QUEUE),
    ("Resources", "it is next, and the nodes or GPUs it asks for are busy", _QUEUE),
    ("BeginTime", "it may not start yet (after a requeue Slurm waits about two minutes)", "nothing"),
    ("Cleaning|Prolog|Configuring|NodesConfiguring", "its nodes are being made ready", "nothing"),
    ("JobArrayTaskLimit", "as many runs of its sweep are running as it allows at once", "nothing"),
    ("Dependency", "it waits for another job to end", "nothing: `scontrol show job {job}` names that job"),
    (
        "DependencyNeverSatisfied",
        "it waits for a job that ended in another way: it will never start",
        "scancel {job}, and submit again",
    ),
    ("JobHeldUser", "it is held", "scontrol release {job}"),
    ("JobHeldAdmin", "an administrator holds it", "ask the cluster's support"),
    (
        "launch failed requeued held|job requeued in held state|JobHoldMaxRequeue",
        "a node could not start it, and Slurm holds it",
        "look into its log (afina logs), then: scontrol release {job}",
    ),
    (
        "PartitionTimeLimit",
        "it asks for more time than the partition allows: it will never start",
        "scontrol update JobId={job} TimeLimit=…, or cancel it and submit again with a shorter --time: the run goes on by "
        "itself from attempt to attempt",
    ),
    (
        "Partition(NodeLimit|MaxNodes|MinNodes|Config)",
        "it asks for what the partition does not allow (more nodes?): it will not start",
        "cancel it, and submit again with fewer --nodes or another SBATCH_PARTITION; `sinfo -s` shows them",
    ),
    ("PartitionDown|PartitionInactive", "the partition takes no jobs just now", _PARTITION),
    (
        "ReqNodeNotAvail.*|ReservedNodes?.*|.*UnavailableNodes.*",
        "nodes it could run on are down, drained or reserved (maintenance?)",
        "`scontrol show reservation` and `sinfo -R` say until when; a --time that ends before may start now",
    ),
    (
        "Nodes required for job are DOWN, DRAINED.*|NodeDown",
        "nodes it could run on are down, drained or reserved",
        "`sinfo -R` says why; fewer --nodes, or another partition",
    ),
    ("Reservation|ReservationDeleted", "it waits for its reservation", "scontrol show reservation"),
    ("BurstBuffer\\w*", "the cluster copies files for it", "nothing"),
    ("Licenses", "a licence it asks for is in use", "scontrol show licenses"),
    (
        "BadConstraints|ReqNode.*Constraint.*",
        "no node has all that it asks for: it will never start",
        "cancel it; `sinfo -o '%P %D %c %m %G %f'` shows what nodes there are",
    ),
    (
        "InvalidAccount|AccountNotAllowed",
        "the account may not be used here",
        "set SBATCH_ACCOUNT in site.env; `sacctmgr show assoc user=$USER` lists yours",
    ),
    ("InvalidQOS|QOSNotAllowed", "the quality of service may not be used here", "set SBATCH_QOS in site.env"),
    (
        "(Assoc|QOS)Grp\\w*RunMin\\w*",
        "your group's running jobs hold as much compute time as the group may have at once",
        f"nothing: it starts when another of them ends; a shorter --time counts for less; {_LIMITS}",
    ),
    (
        "(Assoc|QOS)Grp(\\w*Minutes|Wall)(Limit)?",
        "the group's budget of compute time is used up",
        "`sshare -U` and the cluster's pages show the budget; use another SBATCH_ACCOUNT, or ask for more",
    ),
    (
        "(Assoc|QOS)MaxWall.*|(Association|QOS)TimeLimit",
        "it asks for more time than your limits allow",
        f"a shorter --time; {_LIMITS}",
    ),
    (
        "(QOS|Assoc)Max\\w*(PerJob|PerNode)\\w*|(QOS|Assoc)Min\\w*",
        "it asks for more (or less) than one job may have: it will not start",
        f"cancel it, and submit again for less; {_LIMITS}",
    ),
    (
        "(QOS|Assoc)?(Max|Grp)(Submit)?Jobs?(?!\\w*PerNode).*|(Association|QOS)JobLimit",
        "you (or your group) have as many jobs as the limits allow",
        f"nothing: it starts when another of them ends; {_LIMITS}",
    ),
    (
        "QOSMax\\w*PerUser\\w*|QOSResourceLimit",
        "your running jobs hold as many GPUs, cores or nodes as one user may have",
        f"nothing: it starts when another of them ends; {_LIMITS}",
    ),
    (
        "(QOS|Assoc)Grp\\w+|AssociationResourceLimit|Max\\w+PerAccount|AccountingPolicy",
        "your group's jobs hold as much as the group may have",
        f"nothing: it starts when another of them ends; {_LIMITS}",
    ),
    (
        "FrontEndDown|SystemFailure|.*[Ss]ystem.*",
        "Slurm or a node of it is in trouble",
        "wait, or ask the cluster's support",
    ),
)


@dataclass(frozen=True)
class Waiting:
    """Why a job waits.

    Attributes:
        reason: Slurm's word.
        words: what it means.
        remedy: what to do.
    """

    reason: str
    words: str
    remedy: str

    def __str__(self) -> str:
        return self.words if self.reason in ("", "None") else f"{self.words} ({self.reason})"


def explain(reason: str, job_id: str) -> Waiting:
    """The words for squeue's reason (its format `%r`) of one job."""
    reason = reason.strip().strip("()")
    for pattern, words, remedy in _REASONS:
        if re.fullmatch(pattern, reason or "None"):
            return Waiting(reason, words, remedy.replace("{job}", job_id))
    return Waiting(reason, "Slurm keeps it waiting", f"scontrol show job {job_id}")
