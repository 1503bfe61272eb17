"""One run: from its plan to its end.

plan         recipe + site, all that is known before the job      job_request  what a caller asks for besides the recipe
new_run      prepare the data, claim the directory                directory    the run directory as a type
commands     every command line that is run                       workers      start a worker and read its answer
allocation   what Slurm gave                                      supervise    one attempt on one node, and its cause of death
outcome      how an attempt ended                                 requeue      what follows it
prune        remove checkpoints that nothing needs                provenance/  how the run was made
"""
