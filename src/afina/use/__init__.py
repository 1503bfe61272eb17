"""A finished run at work: predict, export, load."""
