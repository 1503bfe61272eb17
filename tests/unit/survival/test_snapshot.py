"""Snapshots: copies of the state, and random states."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from afina.errors import EnvironmentProblem
from afina.worker.survival.snapshot import Saver, Snapshot, copy_to_host, random_state, set_random_state


def test_a_copy_does_not_change_and_shares_memory_as_the_original_does() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    value = {"a": weight, "tied": weight, "part": weight[0], "n": [1, (weight, "x")], "none": None}
    copy = copy_to_host(value)
    assert copy["a"] is copy["tied"] is copy["n"][1][0]
    weight.zero_()
    assert copy["a"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] and copy["part"].tolist() == [0.0, 1.0, 2.0]
    assert copy["n"][1][1] == "x" and copy["none"] is None


def test_random_states_are_restored_from_a_file(tmp_path: Path) -> None:
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        random.gauss(0, 1)
        np.random.standard_normal()
        torch.save(random_state(), tmp_path / "state")
        expected = (random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
        torch.save(random_state(), tmp_path / "later")
        set_random_state(torch.load(tmp_path / "state", weights_only=True))
        assert (
            random.random(),
            random.gauss(0, 1),
            np.random.standard_normal(3).tolist(),
            torch.rand(3).tolist(),
        ) == expected


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail at x.cc:664] . unexpected pos 7")],
)
def test_a_checkpoint_that_cannot_be_written_is_a_problem_of_the_disk(error: Exception, tmp_path: Path) -> None:
    """Which ones are: tests/unit/training/test_failures.py."""

    def fails(folder: Path, weights: object) -> None:
        raise error

    saver = Saver(tmp_path / "checkpoints", 2, tmp_path / "log", lambda **about: None)
    saver.begin(Snapshot(7, fails, {}, {}, {}, {}, {}, None), 0.0)
    with pytest.raises(EnvironmentProblem, match="a checkpoint cannot be written: ") as caught:
        saver.finish()
    assert caught.value.cause == "disk" and "the previous checkpoint is untouched" in caught.value.remedy
    assert not list((tmp_path / "checkpoints").iterdir()), "the space that was taken is free again"
