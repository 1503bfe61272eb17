"""Findings: one line for each check of the doctor and of `afina image`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

__all__ = ["Finding", "Level"]

Level = Literal["ok", "warning", "failed", "unknown"]


@dataclass(frozen=True)
class Finding:
    """The result of one check; `remedy` says what to do about it, where there is something to do."""

    check: str
    level: Level
    message: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)
