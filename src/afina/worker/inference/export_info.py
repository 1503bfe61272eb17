"""`afina.json` in an exported model folder: text columns and longest input of its training, for prediction with that folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from afina.errors import InputError

__all__ = ["FILE_NAME", "export_info"]

FILE_NAME = "afina.json"


def export_info(folder: Path) -> dict[str, Any]:
    """`text_columns`, `max_length`, `task`; empty where the folder has no such file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        info = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"model: {folder / FILE_NAME} cannot be read: {error}", "export the model again") from None
    return info if isinstance(info, dict) else {}
