"""Slurm: the only room that runs its commands.

client      run a command, with a remedy for each refusal     query       state and reason of jobs; cancel
submit      sbatch                                            submitit_job  the same run through submitit
cluster     partitions, accounts, QOS                         limits      what no partition will ever run
reasons     why a job waits, in words                         accounting  what a job used, from sacct
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "NodeTask":  # pickles of runs submitted by earlier versions name it here
        from afina.slurm.submitit_job import NodeTask

        return NodeTask
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
