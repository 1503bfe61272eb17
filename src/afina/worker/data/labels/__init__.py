"""Labels: the task that the data shows, label names, checks of both, and weights in the loss."""
