"""Preflight checks of the disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.unit.conftest import private_mounts

from afina.errors import EnvironmentProblem
from afina.recipe.keys.train_keys import Train
from afina.run.directory import RunDir
from afina.sizes import Sizes
from afina.worker.survival import preflight


def _sizes(checkpoint: int) -> Sizes:
    return Sizes(checkpoint // 3, checkpoint, checkpoint, checkpoint // 3)


def test_too_little_space_is_an_error_before_the_first_step(run: RunDir, tmp_path: Path) -> None:
    assert preflight.check_room(run, _sizes(1000), Train())["needed_gb"] == 0
    with pytest.raises(EnvironmentProblem, match="TB, ") as caught:
        preflight.check_room(run, _sizes(10**18), Train())
    assert caught.value.cause == "disk" and "keep_checkpoints" in caught.value.remedy
    done = private_mounts(
        'mount -t tmpfs -o size=40m,nr_inodes=150 tmpfs "$1"; shift; exec "$@"',
        tmp_path,
        sys.executable,
        "-c",
        "import sys; from afina.run.directory import RunDir; from afina.worker.survival import preflight\n"
        "from afina.recipe.keys.train_keys import Train; from afina.sizes import Sizes\n"
        "preflight.check_room(RunDir(sys.argv[1]), Sizes(400, 1600, 1200, 400), Train())",
        tmp_path,
    )
    assert done.returncode == 1 and "inodes are free" in done.stderr


def test_a_limit_on_the_size_of_files_is_named_before_the_first_step(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.resource, "getrlimit", lambda kind: (1000, 1000))
    preflight.check_room(run, _sizes(2000), Train())
    with pytest.raises(EnvironmentProblem, match=r"1,000 bytes here \(ulimit -f\)"):
        preflight.check_room(run, _sizes(9000), Train())
