"""What keeps a run safe: checkpoints, snapshots, stop requests, the watchdog, the lease, preflight checks."""
