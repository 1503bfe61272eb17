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

from afina.recipe.schema import Recipe

__all__ = ["give_to_user", "project_folder", "write_recipe"]


def give_to_user(path: Path, cluster: Cluster) -> None:
    """Let the ordinary user own `path` and everything in it."""
    for name in (path, *path.rglob("*")):
        shutil.chown(name, cluster.user, cluster.user)


def write_recipe(folder: Path, name: str, **resources: Any) -> Recipe:
    """Two reviews in `folder`, and a recipe for them whose model is never loaded; resources beside one core and five minutes."""
    (folder / "reviews.csv").write_text("text,stars\ngood,5\nbad,1\n")
    part = {"fraction": 0.5, "seed": 1}
    data = {
        "files": {"all": str(folder / "reviews.csv")},
        "text": "text",
        "label": "stars",
        "train": part,
        "eval": part,
    }
    resources = {"cpus_per_gpu": 1, "time": 5, **resources}
    return Recipe.model_validate({"name": name, "model": "owner/model", "data": data, "resources": resources})


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
