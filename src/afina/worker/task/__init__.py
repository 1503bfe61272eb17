"""What a task is in numbers: decisions and probabilities of logits, losses, metrics built in and of one's own."""
