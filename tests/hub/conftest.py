"""Puts the repository on the import path, so that `tests.hub.server` and `tests.tiny` are found by plain `pytest` too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
