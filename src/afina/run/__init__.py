"""One run: plan, directory, outcome, generated commands, record, supervision, requeueing, and the door to the worker."""
