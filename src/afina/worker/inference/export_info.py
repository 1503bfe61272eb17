"""`afina.json` in an exported model folder: how the model wants its texts. Written by export, read where it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from afina.errors import InputError

__all__ = ["NOTE", "note_of"]

NOTE = "afina.json"


def note_of(folder: Path) -> dict[str, Any]:
    """`text_columns`, `max_length`, `task`; empty where the folder has none.

    Raises:
        InputError: it cannot be read.
    """
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"model: {folder / NOTE} cannot be read: {error}", "export the model again") from None
    return note if isinstance(note, dict) else {}
