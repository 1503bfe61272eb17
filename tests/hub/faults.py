"""What the test hub does instead of answering, and with which words it says so."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "Answer", "Fault", "patience", "refusal"]

KINDS = {"gated", "private", "missing", "rate_limit", "error", "cut", "reset", "stall"}


@dataclass
class Fault:
    """What a repository does instead of answering.

    kind: gated       files: 401 without a token, 403 with one that is not on the list; metadata stays readable
          private     everything: 401 without a token, 404 with one that has no access
          missing     everything: 404, whoever asks
          rate_limit  429, with `Retry-After: retry_after` (1 unless told otherwise) and the Hub's rate limit headers
          error       `status`, 500 unless told otherwise; with `Retry-After` only if `retry_after` is given
          cut, reset  the connection is closed (FIN), or reset (RST), after `after_bytes` of an answer's content; a
                      shorter answer passes and does not count
          stall       like cut, but silent for `seconds` before it closes
    """

    repo: str
    kind: str
    times: int | None = None  # how often; None: always
    only: str = "*"  # pattern for the file names it concerns; metadata requests have the name ""
    scope: str = "all"  # "api", "files" or "all"
    status: int = 500
    after_bytes: int = 0
    seconds: float = 0.0
    retry_after: int | None = None
    hits: int = 0

    def concerns(self, scope: str, name: str, length: int | None) -> bool:
        if self.times is not None and self.hits >= self.times:
            return False
        if length is not None and self.after_bytes >= length:
            return False
        return self.scope in ("all", scope) and fnmatch.fnmatchcase(name, self.only)


class Answer(Exception):
    """Ends the handling of a request: raised wherever the answer is known."""

    def __init__(self, status: int, payload: Any = None, headers: Mapping[str, str] | None = None):
        super().__init__(status)
        self.status, self.payload, self.headers = status, payload, dict(headers or {})


def refusal(status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, {"error": message}, named | dict(headers or {}))


def patience(fault: Fault) -> dict[str, str]:
    """The headers by which the Hub says how long to wait."""
    if fault.retry_after is None:
        return {}
    headers = {"Retry-After": str(fault.retry_after)}
    if fault.kind == "rate_limit":
        headers["RateLimit"] = f'"api";r=0;t={fault.retry_after}'
        headers["RateLimit-Policy"] = '"fixed window";"api";q=500;w=300'
    return headers
