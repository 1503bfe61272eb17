"""The pretrained model: folder checks, weights, tasks, metrics, outputs, training arguments."""
