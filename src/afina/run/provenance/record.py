"""`record.json`: how a run was made, and what it takes to make it again. Written once, when the run is claimed.

It holds the versions, the image's digest, the repository's commit and difference, the revisions of model and data, and the recipe's overrides.
Facts about the machine that trains (processor, GPU, driver, versions of PyTorch and Transformers) are in each attempt's `env.json`.
Secrets are redacted, the site's account is left out.

Overrides are not those of the command line: they are what must be set over the recipe's text to get the recipe that was run
(`overrides_of`), however it was changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from afina.errors import AfinaError, RecipeError
from afina.files import read_json
from afina.recipe.parse import parse_recipe
from afina.recipe.schema import Recipe
from afina.redact import redact_settings
from afina.run.plan import Plan
from afina.run.provenance.git import repository_state
from afina.site.pulled import image_sha256
from afina.site.settings import Site
from afina.text import plural
from afina.version import __version__

__all__ = ["FORMAT", "differences", "image_record", "make_record", "overrides_of", "read_record", "recipe_as_run"]

FORMAT = 1

Say = Callable[[str], None]


def _to_stderr(line: str) -> None:
    print(f"afina: {line}", file=sys.stderr, flush=True)


def make_record(
    plan: Plan, prepared: Mapping[str, Any], text: str, slurm: str | None, say: Say = _to_stderr
) -> dict[str, Any]:
    """The record of a run that is about to be claimed.

    Args:
        prepared: the answer of the prepare stage; an empty one gives a record without data and model.
        slurm: the version of Slurm, or None where there is none.
        text: the recipe as it goes into the run directory.
        say: called with a line before a step that takes seconds.
    """
    recipe = plan.recipe
    git = repository_state(plan.recipe_file) if plan.recipe_file else {"none": "the recipe came from no file"}
    if git.get("diff"):
        git["diff"] = _without_account(git["diff"], plan.site)
    return {
        "format": FORMAT,
        "afina": __version__,
        "claimed": round(time.time(), 3),
        "plan": plan.digest,
        "recipe": {
            "file": str(plan.recipe_file) if plan.recipe_file else None,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "overrides": overrides_of(text, recipe),
        },
        "image": image_record(plan.site, say),
        "git": git,
        "model": {"name": recipe.model, "commit": prepared.get("model_commit"), "files": prepared.get("model_files")},
        "data": {
            "hub": recipe.data.hub,
            "files": {part: [str(path) for path in paths] for part, paths in plan.files.items()},
            "commit": prepared.get("data_commit"),
            "prepared": prepared.get("digest"),
            "read": prepared.get("files"),
        },
        "claimed_on": {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "machine": platform.machine(),
        },
        "slurm": slurm,
    }


def read_record(run: Path) -> dict[str, Any]:
    """The record of a run, or an empty one where there is none (runs of afina before 0.2) or it is damaged."""
    return read_json(run / "record.json")


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two records, in words; values that one lacks are not compared."""
    lines = []
    for name, keys in {
        "afina": ("afina",),
        "image": ("image", "sha256"),
        "git commit": ("git", "commit"),
        "changes since that commit": ("git", "diff_sha256"),
        "recipe": ("recipe", "sha256"),
        "model revision": ("model", "commit"),
        "data revision": ("data", "commit"),
        "prepared data": ("data", "prepared"),
        "Python of the host": ("claimed_on", "python"),
        "Slurm": ("slurm",),
    }.items():
        before, after = (_at(record, keys) for record in (then, now))
        if before is not None and after is not None and before != after:
            lines.append(f"{name}: {_short(before)} then, {_short(after)} now")
    old, new = (_at(record, ("model", "files")) or {} for record in (then, now))
    changed = [name for name in old if name in new and old[name] != new[name]]
    if changed:
        lines.append(f"model files: {', '.join(changed)}")
    old, new = (_at(record, ("data", "read")) or {} for record in (then, now))
    lines += [_file_difference(name, old.get(name), new.get(name)) for name in {**old, **new} if old and new]
    return [line for line in lines if line]


def _file_difference(name: str, then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str:
    """The change of a data file in words; empty if nothing changed."""
    if then is None or now is None:
        return f"data file {name}: {'not used then' if then is None else 'not used now'}"
    if then.get("sha256") == now.get("sha256"):
        return ""
    before, after = (each.get("rows") for each in (then, now))
    if before is None or after is None:
        return f"data file {name}: changed"
    same = before == after
    return (
        f"data file {name}: changed, {plural(before, 'row')} as before"
        if same
        else f"data file {name}: {plural(before, 'row')} then, {after:,} now"
    )


def recipe_as_run(run: Path, plan: Plan) -> tuple[str, list[str], str]:
    """The recipe's text, its overrides, and a note if `recipe.yaml` is not the recipe that was run: then the text is the plan's."""
    whole = json.dumps(plan.recipe.model_dump(mode="json"), indent=2, ensure_ascii=False)
    try:
        text = (run / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return whole, [], "recipe.yaml is missing: the recipe is taken from plan.json"
    overrides = (read_record(run).get("recipe") or {}).get("overrides")
    lines = [str(line) for line in overrides] if isinstance(overrides, list) else []
    # A recipe of afina 0.1 divided its rows by their order, and so does its rerun.
    for more in ([], ["data.split_by=order"]):
        with contextlib.suppress(RecipeError):
            if parse_recipe(text, [*lines, *more]) == plan.recipe:
                return text, [*lines, *more], ""
    return whole, [], "recipe.yaml and record.json do not give the recipe that was run: it is taken from plan.json"


def _at(record: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) in (40, 64) and all(c in "0123456789abcdef" for c in text) else text


def overrides_of(text: str, recipe: Recipe) -> list[str] | None:
    """`key=value` lines that make `recipe` of `text`; `parse_recipe(text, lines)` gives it back, or the answer is None."""
    wanted = recipe.model_dump(mode="json")
    base: dict[str, Any] = {}
    with contextlib.suppress(RecipeError):  # a key that is required may be missing and come from an override
        base = parse_recipe(text).model_dump(mode="json")
    every = [f"{key}={_yaml(value)}" for key, value in wanted.items()]
    for lines in (list(_set_over(base, wanted, "")), every):
        with contextlib.suppress(AfinaError):
            if parse_recipe(text, lines) == recipe:
                return lines
    return None


def _set_over(base: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> list[str]:
    lines: list[str] = []
    for key, value in wanted.items():
        before = base.get(key)
        if key in base and before == value:
            continue
        # Below a mapping a key can be set, not taken away.
        plain = isinstance(value, Mapping) and all(k.replace("_", "").isalnum() for k in value)
        if plain and isinstance(before, Mapping) and set(before) <= set(value):
            lines += _set_over(before, value, f"{path}{key}.")
        else:
            lines.append(f"{path}{key}={_yaml(value)}")
    return lines


def _yaml(value: Any) -> str:
    """JSON, which is YAML too; numbers with a point before the exponent, as YAML 1.2 wants them."""
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")
    return json.dumps(value, ensure_ascii=False)


def image_record(site: Site, say: Say = _to_stderr) -> dict[str, Any] | None:
    """Path, size and SHA-256 of the image, and of a pulled one its address and digest there; None where there is none."""
    if site.image is None or site.runtime == "none":
        return None
    about: dict[str, Any] = {"path": str(site.image)}
    if site.image_address is not None:
        about |= {"address": site.image_address, "digest": site.image_digest}
    try:
        digest = image_sha256(site.image, site.cache / "images", say)
        return {**about, "size": site.image.stat().st_size, "sha256": digest}
    except OSError as error:  # inside the container the image itself is not to be seen
        return {**about, "sha256": None, "none": f"cannot be read here: {error.strerror}"}


def _without_account(text: str, site: Site) -> str:
    for name, value in site.sbatch.items():
        if name.endswith("ACCOUNT") and len(value) >= 3:
            text = text.replace(value, "***")
    return redact_settings(text)
