"""For all suites: Ctrl-C works, and the files with the most slow tests come first."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

# What a shell starts in its background ignores Ctrl-C, and so would all that these tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
