"""Programs that run once per node or job around the training processes: launch, finish, a search's next trial, and a rehearsal."""
