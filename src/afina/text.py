"""Numbers and tables in words: durations, sizes, counts, aligned columns. Slurm's own time format is in `afina.recipe.time_limit`."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from typing import Any, TextIO

__all__ = [
    "CLEAR_LINE",
    "aligned",
    "can_draw",
    "finite",
    "minutes_in_words",
    "number",
    "p_value",
    "plural",
    "seconds_in_words",
    "short_duration",
    "size_in_words",
]


#: Goes to the beginning of the line and clears it: what a bar left there.
CLEAR_LINE = "\r\033[K"


def can_draw(stream: TextIO | None) -> bool:
    """True if a bar may be drawn there: a terminal that can clear a line, not a pipe, not `TERM=dumb`."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def minutes_in_words(number: float) -> str:
    """`90 min` below two hours, then `2 h 30 min`, from two days on `3 days 4 h`; to the minute."""
    whole = round(number)
    if whole < 120:
        return f"{whole} min"
    days, hours, rest = (
        (whole // 1440, whole % 1440 // 60, whole % 60) if whole >= 2880 else (0, whole // 60, whole % 60)
    )
    parts = ((days, "days"), (hours, "h"), (rest, "min"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count)


def seconds_in_words(seconds: float) -> str:
    """`45 s` below two minutes, then as `minutes_in_words`."""
    return f"{seconds:.0f} s" if seconds < 120 else minutes_in_words(seconds / 60)


def short_duration(seconds: float | None) -> str:
    """For a column of a table: `45 s`, `12 min`, `3 h 05`, `2 d 4 h`; `-` for None."""
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d}"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def size_in_words(num_bytes: float) -> str:
    """`3.1 GB`, in decimal units, as `df -H` and quotas count."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < (1000 if unit == "B" else 999.95) or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def number(value: float | None) -> str:
    """A score, everywhere alike: four digits after the point; `1.235e-05` for what these cannot show; `–` for None and NaN."""
    if value is None or value != value:
        return "–"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3e}"


def p_value(p: float | None) -> str:
    """A p-value, everywhere alike: three digits after the point, `< 0.001` below, `–` for None and NaN."""
    return "–" if p is None or p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 run`, `2,000 runs`; with the plural in `many`, which may hold a verb, `1 row has`, `2 rows have`."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of aligned cells, two blanks between columns.

    Args:
        right: numbers of the columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def finite(value: Any) -> Any:
    """Plain values with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
