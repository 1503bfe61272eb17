"""Which rank a line of the log is from: ranks other than 0 begin theirs with `[rank K] `. `afina logs --rank K` reads it.

All ranks of a node write into one file. What a library writes past Python (NCCL, the stacks of a hanging process) is not marked.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO, cast

__all__ = ["mark_lines"]


def mark_lines(rank: int) -> None:
    """Mark what this process prints from now on; rank 0 stays as it is."""
    if rank:
        sys.stdout = cast(TextIO, _Marked(sys.stdout, rank))
        sys.stderr = cast(TextIO, _Marked(sys.stderr, rank))


class _Marked:
    """A text stream that begins each line with the rank, and passes whole lines on in one piece."""

    def __init__(self, stream: TextIO, rank: int) -> None:
        self._stream, self._mark, self._line = stream, f"[rank {rank}] ", ""

    def write(self, text: str) -> int:
        *whole, self._line = (self._line + text).split("\n")
        if whole:
            self._stream.write("".join(f"{self._mark}{line}\n" for line in whole))
        return len(text)

    def flush(self) -> None:
        if self._line:
            self.write("\n")
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
