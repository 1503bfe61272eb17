"""Predictions as Slurm jobs: shares of an array, and a job near its limit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import ROOT, program
from tests.unit.conftest import Ran
from tests.unit.prediction.conftest import here

from afina.prediction.request import folder_of
from afina.worker.predicting import predict_parts


def test_submitted_shares_are_one_prediction(
    run: Path, reviews: Path, tmp_path: Path, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script that sbatch was given is run as Slurm would run its tasks."""
    here(run, reviews, tmp_path / "whole.csv", chunk_rows=40)
    bin_dir = tmp_path / "bin"
    program(bin_dir, "sbatch", f'printf "%s\\0" "$@" >{json.dumps(str(tmp_path))}/argv; echo "4711;cluster"\n')
    program(bin_dir, "squeue", f"cat {json.dumps(str(tmp_path))}/queue\n")
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    out = tmp_path / "out 100%.csv"
    options = ["-o", out, "--chunk-rows", "40"]
    done = command(
        "predict", run, reviews, *options, "--submit", "--array", "2", "--time", "90", "--gpus-per-node", "0"
    )
    assert done.returncode == 0, done.stderr
    assert "submitted job 4711, 2 tasks: 203 rows in 6 chunks" in done.stdout
    argv = (tmp_path / "argv").read_text().split("\0")[:-1]
    parts = folder_of(out)
    assert argv[-3:] == [str(parts / "predict.sbatch"), str(parts), "2"]
    assert {"--array=0-1", "--time=90", "--nodes=1", "--job-name=predict-stars it's"} <= set(argv)
    assert f"--output={str(out).replace('%', '%%')}.slurm-%A_%a.out" in argv
    assert not any(word.startswith("--gpus") for word in argv)
    (tmp_path / "queue").write_text("4711_1|4711|PENDING|1:00|N/A||Resources\n4711_0|4712|COMPLETED|0:00|1|n1|None\n")
    refused = command("predict", run, reviews, *options)
    assert refused.returncode == 2 and "job 4711 is still working on this" in refused.stderr
    (tmp_path / "queue").write_text("")
    assert not predict_parts.run(str(parts), 1, 2, and_merge=True, progress="log")["merged"]
    env = {**os.environ, "SLURM_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "0"}
    ran = subprocess.run(["bash", *argv[-3:]], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "share 0 of 2 ended with 0" in ran.stdout
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    script = shutil.copy(ROOT / "slurm/predict.sbatch", tmp_path / "spooled")
    env["SLURM_JOB_ID"] = "9"
    late = subprocess.run(["bash", script, parts, "2"], env=env, capture_output=True, text=True, check=False)
    assert late.returncode == 0 and "the prediction is whole" in late.stdout


@pytest.mark.parametrize("made", [True, False])
def test_a_job_near_its_limit_goes_back_into_the_queue_if_it_made_a_part(
    made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch script with a worker that only waits, and USR1 as Slurm sends it."""
    program(tmp_path / "bin", "scontrol", f'echo "$@" >>{json.dumps(str(tmp_path))}/asked\nexit 1\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    parts = tmp_path / "out.csv.parts"
    parts.mkdir()
    (parts / "part-000000.parquet").touch()
    shutil.copy(ROOT / "slurm/job.sh", parts)
    body = f'touch "{parts}/part-00000{2 if made else 1}.parquet" "{tmp_path}/begun"; exec sleep 60\n'
    (parts / "worker.argv").write_bytes(b"bash\0-c\0" + body.encode() + b"\0worker\0")
    argv = ["bash", str(ROOT / "slurm/predict.sbatch"), str(parts), "2"]
    job = subprocess.Popen(argv, env={**os.environ, "SLURM_JOB_ID": "88"}, stdout=subprocess.PIPE, text=True)
    for _ in range(500):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=30)
    if made:
        assert (tmp_path / "asked").read_text() == "requeue 88\n"
        assert job.returncode == 75
    else:
        assert not (tmp_path / "asked").exists()
        assert "no part was made within the time limit" in output and job.returncode not in (0, 75)
