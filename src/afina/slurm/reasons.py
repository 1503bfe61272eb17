"""Why a job waits, in plain words, and what to do about it.

squeue gives a reason as one word (`QOSMaxGRESPerUser`). The table covers Slurm 22.05 to 25.05, from its manual (squeue, "JOB
REASON CODES") and its source; a reason that is not in it is shown as Slurm names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Waiting", "explain"]

_QUEUE = "nothing: it starts when resources are free; a shorter --time fits into gaps sooner"
_PARTITION = "`sinfo -o '%P %a %l %D'` shows the partitions; set SBATCH_PARTITION in site.env and submit again"
_LIMITS = "`sacctmgr show qos format=name,maxtrespu,maxjobspu,maxwall` shows the limits"
_TURN, _LATER = (
    "nothing: it starts when another of them ends",
    "wait until another of them ends, then repeat the command",
)

#: A pattern for the whole reason -> what it means, what to do; where sbatch refuses a job for it, that too. `{job}` stands for the job id.
_REASONS: tuple[tuple[str, str, str] | tuple[str, str, str, str], ...] = (
    ("None|PENDING|WaitingForScheduling", "Slurm has not considered it yet", "nothing: check again in a minute"),
    ("Priority", "jobs with a higher priority start first", _QUEUE),
    ("Resources", "it is next, and the nodes or GPUs it asks for are busy", _QUEUE),
    ("BeginTime", "it may not start yet (after a requeue Slurm waits about two minutes)", "nothing"),
    (
        "SUSPENDED|STOPPED",
        "Slurm has suspended it: its processes stand still",
        "nothing: it goes on where it was when Slurm resumes it",
    ),
    ("REQUEUED|REQUEUE_FED", "Slurm is putting it back into the queue", "nothing"),
    ("Cleaning|Prolog|Configuring|NodesConfiguring|CONFIGURING", "its nodes are being prepared", "nothing"),
    ("JobArrayTaskLimit", "its sweep runs as many jobs at once as it allows", "nothing"),
    ("Dependency", "it waits for another job to end", "nothing: `scontrol show job {job}` names that job"),
    (
        "DependencyNeverSatisfied",
        "it depends on a job that ended otherwise: it will never start",
        "scancel {job}, and submit again",
    ),
    ("JobHeldUser", "it is held", "scontrol release {job}"),
    ("JobHeldAdmin", "an administrator holds it", "ask the cluster's support"),
    (
        "launch failed requeued held|job requeued in held state|JobHoldMaxRequeue|REQUEUE_HOLD|SPECIAL_EXIT|RESV_DEL_HOLD",
        "Slurm has put it back and holds it, as after a node could not start it",
        "read its log (afina logs), then: scontrol release {job}",
    ),
    (
        "PartitionTimeLimit",
        "it asks for more time than the partition allows: it will never start",
        "scontrol update JobId={job} TimeLimit=…, or cancel it and submit again with a shorter --time: the run continues "
        "from attempt to attempt",
    ),
    (
        "Partition(NodeLimit|MaxNodes|MinNodes|Config)",
        "it asks for what the partition does not allow (more nodes?): it will not start",
        "cancel it, and submit again with fewer --nodes or another SBATCH_PARTITION; `sinfo -s` shows them",
    ),
    ("PartitionDown|PartitionInactive", "the partition is not accepting jobs now", _PARTITION),
    (
        "ReqNodeNotAvail.*|ReservedNodes?.*|.*UnavailableNodes.*",
        "nodes it could run on are down, drained or reserved (maintenance?)",
        "`scontrol show reservation` and `sinfo -R` show until when; a --time that ends before may start now",
    ),
    (
        "Nodes required for job are DOWN, DRAINED.*|NodeDown",
        "nodes it could run on are down, drained or reserved",
        "`sinfo -R` shows why; ask for fewer --nodes, or another partition",
    ),
    ("Reservation|ReservationDeleted", "it waits for its reservation", "scontrol show reservation"),
    ("BurstBuffer\\w*", "the cluster is copying files for it", "nothing"),
    ("Licenses", "a licence it asks for is in use", "scontrol show licenses"),
    (
        "BadConstraints|ReqNode.*Constraint.*",
        "no node has all that it asks for: it will never start",
        "cancel it; `sinfo -o '%P %D %c %m %G %f'` shows the nodes there are",
    ),
    (
        "InvalidAccount|AccountNotAllowed",
        "this account is not allowed here",
        "set SBATCH_ACCOUNT in site.env; `sacctmgr show assoc user=$USER` lists yours",
    ),
    ("InvalidQOS|QOSNotAllowed", "this quality of service is not allowed here", "set SBATCH_QOS in site.env"),
    (
        "(Assoc|QOS)Grp\\w*RunMin\\w*",
        "your group's running jobs hold as much compute time as the group may have at once",
        f"{_TURN}; a shorter --time counts for less; {_LIMITS}",
        f"{_LATER}; a shorter --time counts for less; {_LIMITS}",
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
        f"ask for less; {_LIMITS}",
    ),
    (
        "(QOS|Assoc)?(Max|Grp)(Submit)?Jobs?(?!\\w*PerNode).*|(Association|QOS)JobLimit",
        "you (or your group) have as many jobs as the limits allow",
        f"{_TURN}; {_LIMITS}",
        f"{_LATER}; {_LIMITS}",
    ),
    (
        "QOSMax\\w*PerUser\\w*|QOSResourceLimit",
        "your running jobs hold as many GPUs, cores or nodes as one user may have",
        f"{_TURN}; {_LIMITS}",
        f"{_LATER}; {_LIMITS}",
    ),
    (
        "(QOS|Assoc)Grp\\w+|AssociationResourceLimit|Max\\w+PerAccount|AccountingPolicy",
        "your group's jobs hold as much as the group may have",
        f"{_TURN}; {_LIMITS}",
        f"{_LATER}; {_LIMITS}",
    ),
    (
        "FrontEndDown|SystemFailure|.*[Ss]ystem.*",
        "Slurm or one of its nodes has a problem",
        "wait, or ask the cluster's support",
    ),
)


@dataclass(frozen=True)
class Waiting:
    """Why a job waits: Slurm's reason, what it means, what to do; `refused` is what to do where sbatch refuses a job for it."""

    reason: str
    words: str
    remedy: str
    refused: str = ""

    def __str__(self) -> str:
        return self.words if self.reason in ("", "None") else f"{self.words} ({self.reason})"


def explain(reason: str, job_id: str) -> Waiting:
    """Explain squeue's reason (its format `%r`) of one job."""
    reason = reason.strip().strip("()")
    for pattern, words, remedy, *refused in _REASONS:
        if re.fullmatch(pattern, reason or "None"):
            return Waiting(reason, words, remedy.replace("{job}", job_id), *refused)
    return Waiting(reason, "Slurm keeps it waiting", f"scontrol show job {job_id}")
