"""The model card of an exported run: README.md, with the metadata that the Hub reads, from the run's record.

The text is `model_card_template.md`, filled in by `huggingface_hub.ModelCard`. Every fact comes from the run directory; what only
the author knows is left open and marked with ✎. No path of this machine is in it: files are named without their folder, and a base
model or data set is linked only if it is on the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.files import read_json
from afina.redact import redact
from afina.run.directory import RunDir
from afina.run.outcome import Outcome, data_warnings
from afina.run.plan import Plan
from afina.run.provenance.methods import execution_of, methods, trained_count
from afina.statistics.decision_rule import described
from afina.statistics.predictions import read_predictions
from afina.text import plural
from afina.worker.model.adapters import labels_config

__all__ = ["CardFacts", "facts_of", "model_card"]

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SCALARS = (int, float)
_TASKS = {
    "single-label": "gives each text one of {n} labels",
    "multi-label": "gives each text any of {n} labels",
    "regression": "gives each text a number",
    "token-classification": "finds entities in texts, by one of {n} labels for each word (IOB2)",
}
#: Our metrics as the Hub names them.
_HUB_METRICS = {"accuracy": "accuracy", "f1": "f1", "precision": "precision", "recall": "recall", "mcc": "matthews_correlation",
                "mse": "mse", "mae": "mae", "pearson": "pearsonr", "spearman": "spearmanr", "auroc": "roc_auc", "brier": "brier_score"}  # fmt: skip
_LISTED = 20
#: Labels with fewer examples in the evaluation set are named.
_FEW = 30


@dataclass(frozen=True)
class CardFacts:
    """Facts of a run for its card.

    Attributes:
        plan, outcome: of the run.
        prepared: the prepare stage's answer.
        labels: names in the order of the model's outputs; None for regression.
        architecture: class name of the model.
        per_class: label, precision, recall, F1 (None where it is not defined) and number of examples, on the evaluation set.
        ran: what the training computed with, see `afina.run.provenance.methods.execution_of`.
        versions: of the libraries that trained it, by name.
        record: `record.json` of the run; empty where it has none.
        parameters: their number in the model.
        onnx: `onnx/model.onnx` is exported too.
        adapter: the folder holds an adapter, not the whole weights.
    """

    plan: Plan
    outcome: Outcome
    prepared: Mapping[str, Any]
    labels: Sequence[str] | None
    architecture: str
    per_class: Sequence[tuple[str, float | None, float | None, float | None, int]] = ()
    ran: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    parameters: int = 0
    onnx: bool = False
    adapter: bool = False


def facts_of(run: RunDir, outcome: Outcome) -> CardFacts:
    """Read the facts; of the weights only the headers."""
    config = read_json(labels_config(run.model) / "config.json")
    names = [str(name) for _, name in sorted((config.get("id2label") or {}).items(), key=lambda pair: int(pair[0]))]
    labels = None if outcome.task == "regression" else names
    return CardFacts(
        plan=run.plan(),
        outcome=outcome,
        prepared=run.prepared(),
        labels=labels,
        architecture=next(iter(config.get("architectures") or []), "a sequence classifier"),
        per_class=_per_class(run, labels),
        ran=execution_of(run),
        versions=_versions(run, outcome),
        record=read_json(run.path / "record.json"),
        parameters=outcome.parameters or _parameters(run.model),
    )


def model_card(facts: CardFacts) -> str:
    """The whole README.md, redacted."""
    from huggingface_hub import ModelCard, ModelCardData

    recipe = facts.plan.recipe
    metadata = ModelCardData(
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag=_pipeline(facts),
        base_model=recipe.model if _on_hub(facts) else None,
        datasets=[recipe.data.hub] if recipe.data.hub else None,
        metrics=_metric_ids(facts) or None,
        model_name=recipe.name,
        eval_results=_results(facts) or None,
        tags=["afina"],
    )
    return redact(
        str(ModelCard.from_template(metadata, template_path=str(_TEMPLATE), **_variables(facts))).rstrip() + "\n"
    )


def _pipeline(facts: CardFacts) -> str:
    return "token-classification" if facts.outcome.task == "token-classification" else "text-classification"


def _variables(facts: CardFacts) -> dict[str, Any]:
    """The template's variables; rows of tables as lists of cells."""
    recipe, labels = facts.plan.recipe, facts.labels
    metrics = {name: value for name, value in facts.outcome.metrics.items() if isinstance(value, _SCALARS)}
    splits = [split for split in ("eval", "test") if any(name.startswith(f"{split}_") for name in metrics)]
    names = list(dict.fromkeys(name.partition("_")[2] for name in metrics))
    rows = facts.prepared.get("rows", {})
    weak = [name for name, *_, f1, count in facts.per_class if count and (f1 or 0) < 0.5]
    few = [name for name, *_, count in facts.per_class if count < _FEW]
    link = f"[{recipe.model}](https://huggingface.co/{recipe.model})"
    return {
        "name": recipe.name,
        "architecture": facts.architecture,
        "parameters": _count(facts.parameters) if facts.parameters else None,
        "task": _TASKS[facts.outcome.task or "single-label"].format(n=len(labels or ())),
        "base": link if _on_hub(facts) else f"`{Path(recipe.model).name}`",
        "data": _data_name(facts),
        "pipeline": _pipeline(facts),
        "auto_class": f"AutoModelFor{'Token' if facts.outcome.task == 'token-classification' else 'Sequence'}Classification",
        "pairs": len(recipe.data.text) == 2,
        "joined": len(recipe.data.text) if len(recipe.data.text) > 2 else None,
        "cut": recipe.tokens.cut,
        "truncated": recipe.tokens.truncation == "head",
        "windows": recipe.tokens.windows,
        "max_length": recipe.tokens.max_length,
        "onnx": facts.onnx,
        "adapter": facts.adapter,
        "labels": labels,
        "decided": described(facts.outcome.decisions),
        "splits": [f"{split} ({plural(rows.get(split, 0), 'row')})" for split in splits],
        "metrics": [[name, *(_number(metrics.get(f"{split}_{name}")) for split in splits)] for name in names],
        "methods": methods(facts.plan, facts.outcome, facts.prepared, facts.record, facts.ran),
        "warnings": _warnings(facts, splits),
        "means": bool(labels) and bool({"f1", "precision", "recall"} & set(names)),
        "best": recipe.train.keep == "best",
        "per_class": [
            [_cell(name), *("–" if value is None else f"{value:.3f}" for value in scores), f"{count:,}"]
            for name, *scores, count in facts.per_class
        ],
        "training": [[name, _cell(value)] for name, value in _training(facts).items() if value not in ("", None)],
        "weak": ", ".join(f"`{name}`" for name in weak[:_LISTED]),
        "few": ", ".join(f"`{name}`" for name in few[:_LISTED]),
    }


def _warnings(facts: CardFacts, splits: Sequence[str]) -> list[str]:
    """Reservations about these numbers, without paths of this machine."""
    spoiled = data_warnings(facts.prepared)
    lines = [*facts.outcome.warnings, *(line for split in splits for line in spoiled.get(split, []))]
    for path in {str(path) for paths in facts.plan.files.values() for path in paths}:
        lines = [line.replace(path, Path(path).name) for line in lines]
    return list(dict.fromkeys(lines))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _count(count: int) -> str:
    """22.7 million, or all digits of a small number."""
    return f"{count / 1e6:,.1f} million" if count >= 1_000_000 else f"{count:,}"


def _training(facts: CardFacts) -> dict[str, Any]:
    recipe, outcome = facts.plan.recipe, facts.outcome
    train, rows, tokens = recipe.train, facts.prepared.get("rows", {}), facts.prepared.get("tokens", {})
    speed = f", {outcome.samples_per_second:,.1f} examples/s" if outcome.samples_per_second else ""
    merged = ", merged" if recipe.adapter and not facts.adapter else ""
    sharded = ", sharded (FSDP2)" if train.sharding != "none" and (outcome.world_size or 1) > 1 else ""
    return {
        "data": _data_name(facts),
        "examples": ", ".join(f"{part} {count:,}" for part, count in rows.items()),
        "tokens": ", ".join(f"{part} {count:,}" for part, count in tokens.items()),
        "texts cut": recipe.tokens.cut,
        "asked for": train.length,
        "optimizer steps": f"{outcome.global_step:,}{outcome.ended_early}; the weights are those of step {outcome.model_step or outcome.global_step:,}",
        "examples per step": train.batch_size,
        "trained": "; ".join(filter(None, (recipe.trained + merged, trained_count(outcome)))) if recipe.trained else "",
        "learning rate": f"{train.learning_rate:g}, {train.arguments.get('lr_scheduler_type', 'linear')} schedule",
        "seed": train.seed,
        **{f"`{name}`": value for name, value in train.arguments.items() if name != "lr_scheduler_type"},
        "ran on": f"{plural(outcome.world_size or 1, 'process', 'processes')}, {outcome.device or 'cpu'}{sharded}; {outcome.seconds:,.0f} s in "
        f"{outcome.attempts} attempt(s){speed}",
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        **_origins(facts),
    }


def _origins(facts: CardFacts) -> dict[str, str]:
    """Commits and digests that the run has recorded."""

    def at(*keys: str) -> Any:
        value: Any = facts.record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    git = at("git", "commit")
    origins = {
        "base model's commit": facts.prepared.get("model_commit"),
        "data set's commit": facts.prepared.get("data_commit"),
        "prepared data": facts.prepared.get("digest"),
        "image (SHA-256)": at("image", "sha256"),
        "git commit": f"{git}, with changes that were not committed" if git and at("git", "diff_sha256") else git,
    }
    return {name: f"`{value}`" for name, value in origins.items() if value}


# -- metadata ---------------------------------------------------------------------------------------------------------


def _on_hub(facts: CardFacts) -> bool:
    return facts.plan.model_folder is None and bool(_HUB_ID.fullmatch(facts.plan.recipe.model))


def _data_name(facts: CardFacts) -> str:
    data = facts.plan.recipe.data
    if data.hub:
        return f"[{data.hub}](https://huggingface.co/datasets/{data.hub})" + (
            f" ({data.config})" if data.config else ""
        )
    names = list(dict.fromkeys(path.name for paths in facts.plan.files.values() for path in paths))
    return ", ".join(f"`{_cell(name)}`" for name in names[:5]) + (
        f" and {len(names) - 5} files more" if len(names) > 5 else ""
    )


def _metric_ids(facts: CardFacts) -> list[str]:
    names = [name.partition("_")[2] for name in facts.outcome.metrics]
    return list(dict.fromkeys(_HUB_METRICS[name] for name in names if name in _HUB_METRICS))


def _results(facts: CardFacts) -> list[Any]:
    """`model-index`: metrics of the evaluation set, and of the test set if there is one."""
    from huggingface_hub import EvalResult

    data, results = facts.plan.recipe.data, []
    names = [path.name for paths in facts.plan.files.values() for path in paths]
    for name, value in facts.outcome.metrics.items():
        part, _, metric = name.partition("_")
        if not isinstance(value, _SCALARS) or metric == "loss":
            continue
        results.append(
            EvalResult(
                task_type=_pipeline(facts),
                task_name=_pipeline(facts).replace("-", " ").title(),
                dataset_type=data.hub or "files",
                dataset_name=data.hub or ", ".join(names[:3]),
                dataset_config=data.config,
                dataset_split=part,
                dataset_revision=facts.prepared.get("data_commit"),
                metric_type=metric,
                metric_name=f"{metric} ({part})",
                metric_value=value,
            )
        )
    return results


# -- from the run directory -------------------------------------------------------------------------------------------


def _per_class(
    run: RunDir, labels: Sequence[str] | None
) -> list[tuple[str, float | None, float | None, float | None, int]]:
    """Precision, recall, F1 and support of each label on the evaluation set, from `predictions.parquet`."""
    if labels is None or not run.predictions.is_file():
        return []
    from afina.statistics.measures import parts, per_class, sums_of

    rows = read_predictions(run.predictions, texts=False)
    sums = sums_of(rows.task, len(rows.labels), rows.truth, rows.predicted)
    scores, actual = per_class(rows.task, sums), parts(sums)[2]
    known = {name: k for k, name in enumerate(rows.labels)}
    labels = list(known) if rows.task == "token-classification" else labels
    rows_of_labels = []
    for name in labels:
        k = known[name]
        p, r, f1 = (
            None if value != value else float(value) for value in (scores[n][k] for n in ("precision", "recall", "f1"))
        )
        rows_of_labels.append((name, p, r, f1, int(actual[k])))
    return rows_of_labels


def _versions(run: RunDir, outcome: Outcome) -> dict[str, str]:
    """From the last attempt's environment and the manifests of the checkpoints."""
    env = read_json(run.attempts / outcome.attempt / "env.json")
    versions = {name: env[name] for name in ("afina", "python") if isinstance(env.get(name), str)}
    for manifest in sorted(run.checkpoints.glob("step-*/manifest.json"), key=lambda path: path.stat().st_mtime):
        versions |= {name: str(version) for name, version in (read_json(manifest).get("versions") or {}).items()}
    return versions


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def _cell(value: Any) -> str:
    """Text that fits into one cell of a table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
