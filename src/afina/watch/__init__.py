"""Runs as they go: `afina status`, `list`, `logs`, `cancel`.

readings   what the files of a run say     overview   all runs, and one question to Slurm
glance     a row of a long table           pending    why a job waits, in words
logs       the log of an attempt           usage      what was asked for, and what was used
halt       ends what is queued or runs
"""
