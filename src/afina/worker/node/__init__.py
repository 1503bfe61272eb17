"""What runs once per node or job around the training processes: launch, finish, and a search's next trial."""
