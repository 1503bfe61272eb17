"""Runs as they go: what their files and Slurm say, their logs, and how they are ended."""
