"""What a run will take, from a rehearsal or from earlier runs."""
