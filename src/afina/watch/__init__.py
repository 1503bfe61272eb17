"""Runs as they go: overview, logs, cancel, the `Run` handle."""
