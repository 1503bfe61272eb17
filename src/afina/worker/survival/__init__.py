"""Surviving the cluster: checkpoints, snapshots, stop requests, the watchdog, the lease, preflight checks."""
