"""The scheduler: client, facts about the cluster, pending reasons, accounting. The only room that runs Slurm's commands."""
