"""Keep secrets out of files, logs and messages.

`redact` replaces secrets in text that is about to be written by `***`: the values of variables whose names end like a secret's (`HF_TOKEN`,
`WANDB_API_KEY`, …), tokens by their shape (the Hub, GitHub, GitLab, AWS, Slack, OpenAI, JWT, private keys), and user and password in
URLs. `redact_settings` is for text that others wrote (a difference of git, a comment): also what is assigned to such a name.
`looks_secret` is for input that must not hold any. Not covered: a secret under a name that does not say so, and one of fewer than
six characters, which may be ordinary words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TextIO, cast

__all__ = ["RedactedStream", "looks_secret", "redact", "redact_comments", "redact_settings"]

_MASK = "***"
_SHORTEST = 6
_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
#: Tokens of the Hugging Face Hub: of a user, of an organisation, from OAuth. Shorter ones may be the name of a column. Then those of
#: GitHub, GitLab, OpenAI and Anthropic, Slack, AWS; JSON web tokens; private keys.
_TOKEN = re.compile(
    r"\b(?:hf|api_org|hf_oauth|hf_jwt)_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
#: `name = value`, `"name": "value"`, `--name=value`, where the name ends like a secret's.
_ASSIGNED = re.compile(
    r"""(?i)((?:token|secret|passw(?:or)?d|credentials?|(?:api|access|secret|private)[_-]?key)["']?[ \t]*[:=][ \t]*["']?)([^\s"',;]{6,})"""
)
#: `scheme://user:password@` or `scheme://token@`.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"<>]+@")


def redact(text: str, env: Mapping[str, str] | None = None) -> str:
    """`text` with `***` in place of every secret.

    Args:
        env: the environment that holds the secrets; by default that of this process.
    """
    env = os.environ if env is None else env
    text = _TOKEN.sub(_MASK, _URL.sub(rf"\g<1>{_MASK}@", text))
    # The longest first: one may be part of another.
    values = {value.strip() for name, value in env.items() if _NAMES.search(name) and name != "AFINA_IMAGE_KEY"}
    for value in sorted((v for v in values if len(v) >= _SHORTEST), key=len, reverse=True):
        text = text.replace(value, _MASK)
    return text


def redact_settings(text: str, env: Mapping[str, str] | None = None) -> str:
    """As `redact`, and `***` for what is assigned to a name like a secret's."""
    return _ASSIGNED.sub(rf"\g<1>{_MASK}", redact(text, env))


def redact_comments(text: str) -> str:
    """A recipe's text: tokens by their shape everywhere, known values and assignments in its comments alone, which change no key."""
    lines = (_TOKEN.sub(_MASK, _URL.sub(rf"\g<1>{_MASK}@", line)) for line in text.splitlines(keepends=True))
    parts = (line.partition("#") for line in lines)
    return "".join(f"{before}{sign}{redact_settings(after) if sign else after}" for before, sign, after in parts)


def looks_secret(value: Any) -> bool:
    """True if a value, or one inside a list or mapping, is a Hub token or a URL with a password."""
    if isinstance(value, str):
        return bool(_TOKEN.search(value) or _URL.search(value))
    if isinstance(value, Mapping):
        return any(looks_secret(v) for pair in value.items() for v in pair)
    return isinstance(value, list | tuple) and any(looks_secret(v) for v in value)


class RedactedStream:
    """A text stream that redacts what is written. A secret that is split between two writes is not recognised."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @classmethod
    def over(cls, stream: TextIO) -> TextIO:
        return cast(TextIO, cls(stream))
