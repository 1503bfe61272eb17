"""afina fine-tunes a pretrained Hugging Face model on labelled text as a Slurm batch job that survives the cluster.

    import afina
    run = afina.submit("recipe.yaml", nodes=2)
    run.result().metrics

The names are imported when they are first used: `import afina` is quick and never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afina.version import __version__

if TYPE_CHECKING:
    from afina.api import resume, submit, train
    from afina.prediction.export import export
    from afina.prediction.jobs import predict
    from afina.prediction.load import load
    from afina.recipe.load import load_recipe
    from afina.recipe.schema import Recipe
    from afina.run.outcome import Outcome
    from afina.sweeps.sweep import Sweep, sweep
    from afina.watch.handle import Run, Runs, runs
    from afina.watch.overview import RunSummary

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
    "Outcome": "afina.run.outcome",
    "Recipe": "afina.recipe.schema",
    "Run": "afina.watch.handle",
    "RunSummary": "afina.watch.overview",
    "Runs": "afina.watch.handle",
    "Sweep": "afina.sweeps.sweep",
    "export": "afina.prediction.export",
    "load": "afina.prediction.load",
    "load_recipe": "afina.recipe.load",
    "predict": "afina.prediction.jobs",
    "resume": "afina.api",
    "runs": "afina.watch.handle",
    "submit": "afina.api",
    "sweep": "afina.sweeps.sweep",
    "train": "afina.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afina' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
