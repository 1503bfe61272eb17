"""Slurm's reasons in words."""

from __future__ import annotations

from afina.slurm.reasons import explain


def test_reasons_are_words_with_something_to_do() -> None:
    for reason, words, remedy in [
        ("Priority", "higher priority", "shorter --time"),
        ("(Resources)", "busy", "shorter --time"),
        ("AssocGrpGRESMinutes", "budget of compute time is used up", "SBATCH_ACCOUNT"),
        ("AssocGrpCPURunMinutesLimit", "at once", "starts when another"),
        ("QOSMaxJobsPerUserLimit", "as many jobs as the limits allow", "sacctmgr show qos"),
        ("QOSMaxWallDurationPerJobLimit", "more time than your limits allow", "shorter --time"),
        ("QOSMaxGRESPerNode", "one job may have", "submit again for less"),
        ("MaxJobsPerAccount", "as many jobs", "starts when another"),
        ("PartitionTimeLimit", "never start", "scontrol update JobId=4_2 TimeLimit"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "down, drained or reserved", "scontrol show reservation"),
        ("JobHeldUser", "held", "scontrol release 4_2"),
        ("DependencyNeverSatisfied", "never start", "scancel 4_2"),
        ("JobArrayTaskLimit", "sweep", "nothing"),
        ("SomethingNewOfSlurm", "keeps it waiting (SomethingNewOfSlurm)", "scontrol show job 4_2"),
    ]:
        waiting = explain(reason, "4_2")
        assert words in str(waiting) and remedy in waiting.remedy, waiting
