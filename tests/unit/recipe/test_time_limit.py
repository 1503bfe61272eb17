"""Slurm's time format: one parser for what users write and for what Slurm prints."""

from __future__ import annotations

import pytest

from afina.recipe.time_limit import parse_seconds
from afina.text import minutes_in_words


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        # What sbatch accepts.
        ("90", 5400),
        ("1:30", 90),
        ("1:30:00", 5400),
        ("1-0", 86400),
        ("1-2:30", 95400),
        # What squeue, sinfo, sacct and sacctmgr print.
        ("0:00", 0),
        ("59:59", 3599),
        ("1-02:03:04", 93784),
        ("2-12:30:59", 217859),
        ("00:01.250", 1.25),
        ("1-00:00:01.500", 86401.5),
        *((text, None) for text in ("", "UNLIMITED", "INVALID", "NOT_SET", "infinite", "n/a", "1.5", "-1", "1:2:3:4", "1h")),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_means_them(text: str, seconds: float | None) -> None:
    assert parse_seconds(text) == seconds
    assert parse_seconds(f" {text}\n") == seconds


@pytest.mark.parametrize(
    ("minutes", "words"),
    [(0, "0 min"), (119.4, "119 min"), (120, "2 h"), (150, "2 h 30 min"), (2879, "47 h 59 min"), (4560, "3 days 4 h")],
)
def test_minutes_in_words(minutes: float, words: str) -> None:
    assert minutes_in_words(minutes) == words
