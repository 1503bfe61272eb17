"""Progress: a line a minute in a log, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from afina.worker.progress import Progress


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    now = [0.0]
    said: list[str] = []
    with Progress(
        "tokenising", "tokenised", "texts", 10_000, said.append, before=1000, clock=lambda: now[0]
    ) as progress:
        for _ in range(90):
            now[0] += 2
            progress.advance(100)
    assert said == [
        "tokenised 4,000 of 10,000 texts, 50 per second, about 2 min left",
        "tokenised 7,000 of 10,000 texts, 50 per second, about 60 s left",
        "tokenised 10,000 of 10,000 texts, 50 per second, about 0 s left",
    ]
    with Progress("reading", "read", "rows", None, said.append, clock=lambda: now[0]) as progress:
        now[0] += 61
        progress.advance(122_000)
    assert said[3:] == ["read 122,000 rows, 2,000 per second"]


def test_a_terminal_gets_a_bar() -> None:
    code = """
import time
from afina.worker.progress import Progress
with Progress("tokenising", "tokenised", "texts", 4000, print) as progress:
    for _ in range(4):
        progress.advance(1000)
        time.sleep(0.15)
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=theirs,
        stdout=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "90"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        shown += block
    os.close(ours)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out == b""
    assert b"tokenising" in shown and b"2000/4000" in shown and b"texts" in shown
