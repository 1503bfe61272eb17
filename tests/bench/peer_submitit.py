"""The plain `Trainer` of peer.py as a submitit job that requeues itself.

submitit sends USR2 before the time limit; its handler pickles what `checkpoint` returns and requeues the job with
`scontrol`, and Trainer resumes from its newest checkpoint. Prints the job's number.

    python tests/bench/peer_submitit.py --folder FOLDER [--python 'apptainer exec IMAGE python'] -- <options of peer.py>
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import submitit


class Training:
    def __init__(self, script: str, options: list[str]) -> None:
        self.argv = [script, *options]

    def __call__(self) -> None:
        sys.argv = self.argv
        runpy.run_path(self.argv[0], run_name="__main__")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="submitit's own folder")
    parser.add_argument("--script", default=str(Path(__file__).with_name("peer.py")))
    parser.add_argument("--python", default=sys.executable, help="the command that starts Python in the job")
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("options", nargs="+")
    given = parser.parse_args()
    executor = submitit.AutoExecutor(given.folder, cluster="slurm", slurm_python=given.python, slurm_max_num_timeout=10)
    executor.update_parameters(name="peer", timeout_min=given.minutes, cpus_per_task=1)
    print(executor.submit(Training(given.script, given.options)).job_id)


if __name__ == "__main__":
    main()
