"""What to train: schema, YAML, `--set`, explained errors, data formats, trackers."""
