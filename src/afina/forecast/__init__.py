"""Forecast of time, memory and disk of a run, from a rehearsal or from earlier runs."""
