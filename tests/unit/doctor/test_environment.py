"""`afina doctor` inside: GPUs, drivers, broken packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afina.ahead import doctor
from afina.worker.checks import environment


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="here is an NVIDIA driver")
@pytest.mark.parametrize(("allocated", "level"), [("2", "warning"), ("0", "ok"), (None, "ok")])
def test_allocated_gpus_without_a_driver_are_a_warning(
    allocated: str | None, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if allocated is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", allocated)
    (finding,) = environment._cuda()
    assert (finding.check, finding.level) == ("cuda", level)
    assert ("train on the CPU" in finding.message) == (level == "warning")


@pytest.mark.parametrize(
    ("cuda", "driver", "level", "words"),
    [
        ("12.6", "525.60.9", "failed", "needs driver 525.60.13 or newer, this is 525.60.9"),
        ("13.0", "570.10", "failed", "needs driver 580.65.06 or newer"),
        ("12.6", "535.104.05", "failed", "driver 535.104.05 is there, and torch cannot use it"),
        (None, "535.104.05", "warning", "there is an NVIDIA driver"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
def test_the_driver_is_held_against_the_one_table(
    cuda: str | None, driver: str, level: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    file = tmp_path / "version"
    file.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Aug 19 01:15:15 UTC 2023\n")
    (finding,) = environment._cuda(file)
    assert finding.level == level and words in finding.message


@pytest.mark.slow
def test_the_inside_is_whole_here_and_a_broken_package_is_found(tmp_path: Path) -> None:
    """Without a site too: the image's own test calls it so. In Python as by the command."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "evaluate.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')\n")
    argv = [sys.executable, "-m", "afina", "doctor", "--inside", "--json"]
    both = [
        subprocess.Popen(argv, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for env in ({}, {"PYTHONPATH": str(broken)})
    ]
    (out, err), (broken_out, _) = (process.communicate(timeout=200) for process in both)
    said = json.loads(out)
    assert both[0].returncode == 0 and said["failed"] == 0, out + err
    by_check = {f["check"]: f for f in said["findings"]}
    assert "torch 2" in by_check["packages"]["message"] and "without network" in by_check["metrics"]["message"]
    assert {"python", "packages", "cuda", "metrics", "room", "compiler", "rdma"} <= set(by_check)
    assert [(f.check, f.level) for f in doctor(in_image=True)] == [(f["check"], f["level"]) for f in said["findings"]]
    with pytest.raises(TypeError, match="nods"):
        doctor(nods=2)  # type: ignore[call-arg]
    assert both[1].returncode == 3
    failed = [f for f in json.loads(broken_out)["findings"] if f["level"] == "failed"]
    assert any("evaluate cannot be imported: libfoo.so.1" in f["message"] for f in failed)
