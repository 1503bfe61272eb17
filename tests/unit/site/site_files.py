"""A site file, the environment that a site is read from, and how it is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from afina.errors import SiteError
from afina.site.settings import load_site


def written(folder: Path, text: str, name: str = "site.env") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def env(**changes: str | Path) -> dict[str, str]:
    return {**os.environ, **{k: str(v) for k, v in changes.items()}}


def refused(given: Path | None = None, **changes: str | Path) -> SiteError:
    with pytest.raises(SiteError) as caught:
        load_site(given, env(**changes))
    assert caught.value.remedy and caught.value.exit_code == 3
    return caught.value
