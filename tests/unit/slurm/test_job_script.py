"""slurm/job.sh, whose functions the batch scripts share: signals around srun. A fake `srun`; the real one: tests/slurm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.common import ROOT, program


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_asks_the_ranks_of_this_attempt_to_stop(tmp_path: Path, late: bool) -> None:
    """A signal after their end (Slurm sends TERM to a job that is requeued) leaves no stop file for the next attempt."""
    program(tmp_path, "srun", "exit 4" if late else 'kill -TERM "$BATCH"; sleep 0.5; exit 4')
    script = f"export BATCH=$$; run=$1; . {ROOT}/slurm/job.sh; afina_step true; kill -TERM $$; echo ended with $code"
    env = {**os.environ, "SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "attempts/7.0").mkdir(parents=True)
    (tmp_path / "lease.json").write_text("{}")
    argv = ["bash", "-c", script, "bash", str(tmp_path)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "ended with 4\n", done.stderr
    assert (tmp_path / "stop").exists() != late
