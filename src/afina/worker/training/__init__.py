"""Training one run: `train` builds an Attempt and a RunTrainer; control, evaluation, meter, log and tracking serve both.

The rooms' order, from the bottom: log, meter; attempt; build, control, evaluation, live_progress, tracking; trainer;
results; train.
"""
