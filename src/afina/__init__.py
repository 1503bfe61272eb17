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
    from afina.ahead import doctor, prefetch, rehearse
    from afina.api import resume, submit, train
    from afina.errors import AfinaError, Cancelled, Failed, Stopped, WaitTimeout
    from afina.prediction.ensemble import make_ensemble as ensemble
    from afina.prediction.export import export
    from afina.prediction.jobs import predict
    from afina.prediction.load_model import load
    from afina.recipe.parse import load_recipe
    from afina.recipe.schema import Recipe
    from afina.reports import write_report as report
    from afina.reports.compare import compare
    from afina.run.outcome import Outcome
    from afina.run.plan import Plan
    from afina.sweeps.sweep import Sweep, sweep
    from afina.watch.handle import Run, Runs, as_completed, runs, wait
    from afina.watch.overview import RunSummary

__all__ = [
    "AfinaError",
    "Cancelled",
    "Failed",
    "Outcome",
    "Plan",
    "Recipe",
    "Run",
    "RunSummary",
    "Runs",
    "Stopped",
    "Sweep",
    "WaitTimeout",
    "__version__",
    "as_completed",
    "compare",
    "doctor",
    "ensemble",
    "export",
    "load",
    "load_recipe",
    "predict",
    "prefetch",
    "rehearse",
    "report",
    "resume",
    "runs",
    "submit",
    "sweep",
    "train",
    "wait",
]

_HOMES = {
    **dict.fromkeys(("AfinaError", "Cancelled", "Failed", "Stopped", "WaitTimeout"), "afina.errors"),
    **dict.fromkeys(("Run", "Runs", "as_completed", "runs", "wait"), "afina.watch.handle"),
    **dict.fromkeys(("doctor", "prefetch", "rehearse"), "afina.ahead"),
    **dict.fromkeys(("resume", "submit", "train"), "afina.api"),
    **dict.fromkeys(("Sweep", "sweep"), "afina.sweeps.sweep"),
    "Outcome": "afina.run.outcome",
    "Plan": "afina.run.plan",
    "Recipe": "afina.recipe.schema",
    "RunSummary": "afina.watch.overview",
    "compare": "afina.reports.compare",
    "ensemble": "afina.prediction.ensemble:make_ensemble",
    "export": "afina.prediction.export",
    "load": "afina.prediction.load_model",
    "load_recipe": "afina.recipe.parse",
    "predict": "afina.prediction.jobs",
    "report": "afina.reports:write_report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afina' has no attribute {name!r}")
    from importlib import import_module

    module, _, inside = _HOMES[name].partition(":")
    return getattr(import_module(module), inside or name)


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
