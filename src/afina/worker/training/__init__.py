"""The training loop: trainer, control, evaluation, meter, log, tracking, rehearsal."""
