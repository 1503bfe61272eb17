"""afina fine-tunes a pretrained Hugging Face model on labelled text as a Slurm batch job that survives the cluster.

    import afina
    run = afina.submit("recipe.yaml", nodes=2)
    run.result().metrics

The names are imported when they are first used: `import afina` is quick and never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from afina.handle import Run, Runs, runs
    from afina.jobs import resume, submit, train
    from afina.recipe import Recipe, load_recipe
    from afina.rundir import Outcome
    from afina.sweeps.api import Sweep, sweep
    from afina.use.export import export
    from afina.use.load import load
    from afina.use.predict import predict
    from afina.watch.overview import RunSummary

__version__ = "0.1.0"
__all__ = [
    "Outcome",
    "Recipe",
    "Run",
    "RunSummary",
    "Runs",
    "Sweep",
    "__version__",
    "export",
    "load",
    "load_recipe",
    "predict",
    "resume",
    "runs",
    "submit",
    "sweep",
    "train",
]

_HOMES = {
    "Outcome": "afina.rundir",
    "Recipe": "afina.recipe",
    "Run": "afina.handle",
    "RunSummary": "afina.watch.overview",
    "Runs": "afina.handle",
    "Sweep": "afina.sweeps.api",
    "export": "afina.use.export",
    "load": "afina.use.load",
    "load_recipe": "afina.recipe",
    "predict": "afina.use.predict",
    "resume": "afina.jobs",
    "runs": "afina.handle",
    "submit": "afina.jobs",
    "sweep": "afina.sweeps.api",
    "train": "afina.jobs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afina' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
