"""A command in a terminal of a given width, and what is on its screen afterwards."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

__all__ = ["in_terminal", "screen"]


def in_terminal(
    *words: str | Path,
    columns: int = 80,
    env: Mapping[str, str] | None = None,
    typed: bytes = b"",
    cwd: Path | None = None,
) -> tuple[int, str]:
    """Exit code of a command whose standard streams are a terminal, and all that it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {"TERM": "xterm", **os.environ, **(env or {})}
    for name in ("COLUMNS", "LINES", "NO_COLOR") if env is None or "NO_COLOR" not in env else ("COLUMNS", "LINES"):
        environment.pop(name, None)
    with subprocess.Popen(
        [*map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=cwd, start_new_session=True
    ) as process:
        os.close(theirs)
        if typed:
            os.write(ours, typed)
        written = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:
                break
            if not block:
                break
            written += block
        code = process.wait(timeout=60)
    os.close(ours)
    return code, written.decode(errors="replace")


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after this: carriage returns, cleared lines, colours."""
    lines: list[list[str]] = [[]]
    column = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", written):
        if part == "\n":
            lines.append([])
            column = 0
        elif part == "\r":
            column = 0
        elif part == "\x1b[K":
            del lines[-1][column:]
        elif not part.startswith("\x1b"):
            line = lines[-1]
            line.extend(" " * (column - len(line)))
            line[column : column + 1] = [part]
            column += 1
    return ["".join(line).rstrip() for line in lines]


AFINA = (sys.executable, "-W", "error", "-m", "afina")
