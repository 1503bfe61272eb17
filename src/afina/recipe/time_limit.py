"""Slurm's time format: `90` (minutes), `90:00`, `1:30:00`, `1-0`, `1-2:30`, `1-2:30:00`.

One parser for what sbatch(1) accepts and for what squeue, sinfo, sacct (`00:01.250`) and sacctmgr print.
"""

from __future__ import annotations

import re

__all__ = ["parse_seconds"]

_FORMAT = re.compile(r"(?:(\d{1,9})-)?(\d{1,9}(?::\d{1,9}){0,2})((?<=:\d\d)\.\d+)?", re.ASCII)


def parse_seconds(text: str) -> float | None:
    """Seconds of a time limit or of a time used; None for anything else (UNLIMITED, INVALID, n/a, …)."""
    match = _FORMAT.fullmatch(text.strip())
    if match is None:
        return None
    fields = [int(field) for field in match[2].split(":")]
    if match[1] is not None:
        hours, minutes, seconds = (*fields, 0, 0)[:3]
    elif len(fields) == 3:
        hours, minutes, seconds = fields
    else:
        hours, (minutes, seconds) = 0, (*fields, 0)[:2]
    return ((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds + float(match[3] or 0)
