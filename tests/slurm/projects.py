"""Project folders of the cluster's ordinary user: site.env, a tiny model, reviews, a recipe; scratch below."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster import Cluster

__all__ = ["give_to_user", "project_folder"]


def give_to_user(path: Path, cluster: Cluster) -> None:
    """Let the ordinary user own `path` and everything in it."""
    for name in (path, *path.rglob("*")):
        shutil.chown(name, cluster.user, cluster.user)


@contextlib.contextmanager
def project_folder(
    cluster: Cluster, prefix: str, image: Path | None = None, recipe: dict[str, Any] | None = None
) -> Iterator[Path]:
    """An empty project folder in /tmp; pytest's own folders are readable by root only. Removed at the end.

    Args:
        prefix: of the folder's name.
        image: with it the folder has a site.env.
        recipe: with it the folder has recipe.yaml.
    """
    path = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    (path / "scratch").mkdir()
    if image:
        (path / "slurm").mkdir()
        scratch, sif = shlex.quote(str(path / "scratch")), shlex.quote(str(image))
        (path / "slurm/site.env").write_text(f"AFINA_SCRATCH={scratch}\nAFINA_IMAGE={sif}\n")
    if recipe:
        (path / "recipe.yaml").write_text(json.dumps(recipe))
    give_to_user(path, cluster)
    try:
        yield path
    finally:
        shutil.rmtree(path)
