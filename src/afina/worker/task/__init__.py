"""A task in numbers: decisions and probabilities from logits, losses, built-in and own metrics."""
