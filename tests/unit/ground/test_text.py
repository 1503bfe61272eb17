"""Durations and sizes in words."""

from __future__ import annotations

import pytest

from afina.text import short_duration, size_in_words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "-"), (0, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 00"), (3700, "1 h 02"), (90000, "1 d 1 h")],
)
def test_times_in_words(seconds: float | None, said: str) -> None:
    assert short_duration(seconds) == said


def test_sizes_in_words() -> None:
    assert [size_in_words(n) for n in (0, 999, 1000, 999_951, 438_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.0 MB",
        "438.0 MB",
    ]
