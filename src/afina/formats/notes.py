"""Oddities of a file that are not errors: collected while the file is read, and shown as warnings."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Notes"]

_SHOWN = 3


class Notes:
    """The oddities of one file, each with its first rows and their number."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = {}
        self._counts: dict[str, int] = {}

    def add(self, message: str, row: int | None = None, count: int = 1) -> None:
        """Note `message` of a row, or of the file.

        Args:
            message: the second half of a sentence that begins with the place: `holds a quote that …`.
            count: rows that it is noted of; `row` is the first.
        """
        self._counts[message] = self._counts.get(message, 0) + count
        rows = self._rows.setdefault(message, [])
        if row is not None and len(rows) < _SHOWN:
            rows.append(int(row))

    def clear(self) -> None:
        """Forget everything: the file is read again."""
        self._rows.clear()
        self._counts.clear()

    def warnings(self, path: Path | str, unit: str) -> list[str]:
        """A line for each."""
        lines = []
        for message, rows in self._rows.items():
            count = self._counts[message]
            place = f", {unit}{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}" if rows else ""
            more = f" (and {count - len(rows):,} more)" if rows and count > len(rows) else ""
            lines.append(f"{path}{place}{more}: {message}")
        return lines
