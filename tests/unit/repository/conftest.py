"""A bench in the process of its test, which shares its imports with other tests; its peers are processes of their own."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.common import ROOT
from tests.unit.forks import ForkedWorkers

Bench = Callable[..., str]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs a bench with arguments; returns its standard output."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/bench"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def run(name: str, *arguments: str | Path) -> str:
        importlib.import_module(name).main(list(map(str, arguments)))
        return capsys.readouterr().out

    return run


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """afina in forks, for benches whose figures of it are not looked at."""
    monkeypatch.setattr(subprocess, "Popen", ForkedWorkers)
