"""Keep secrets out of files, logs and messages.

`redact` replaces secrets in text that is about to be written by `***`: the values of variables whose names end like a secret's (`HF_TOKEN`,
`WANDB_API_KEY`, …), tokens of the Hub wherever they come from, and user and password in URLs. `looks_secret` is for
input that must not hold any. Not covered: a secret under a name that does not say so, and one of fewer than six
characters, which may be ordinary words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TextIO, cast

__all__ = ["RedactedStream", "looks_secret", "redact"]

_MASK = "***"
_SHORTEST = 6
_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
#: Tokens of the Hugging Face Hub: of a user, of an organisation, from OAuth. Shorter ones may be the name of a column.
_TOKEN = re.compile(r"\b(?:hf|api_org|hf_oauth|hf_jwt)_[A-Za-z0-9]{16,}")
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


def looks_secret(value: Any) -> bool:
    """Whether a value, or one inside a list or mapping, is a Hub token or a URL with a password."""
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
