"""For all suites: Ctrl-C works, one thread for a process, and the files with the most slow tests come first."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest

# What a shell starts in its background ignores Ctrl-C, and so would all that these tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Models here are so small that a second thread costs more than it computes; and on two a sum's last digit is another than on one, so
# this process and those that it starts must have as many.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
