"""The model card of an exported run: README.md, with the metadata that the Hub reads, written from the run's record.

Everything in it is read from the run directory; what only its author can say is left open and marked with ✎. No path of
this machine is in it: files are called by their names, and a base model or data set is linked only if it is on the Hub.
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
from afina.run.outcome import Outcome
from afina.run.plan import Plan

__all__ = ["Facts", "facts_of", "model_card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OPEN = "✎ *To be written by the author:*"
_SCALARS = (int, float)
_TASK_WORDS = {
    "single-label": "gives each text one of {n} labels",
    "multi-label": "gives each text any of {n} labels",
    "regression": "gives each text a number",
}


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        plan, outcome: of the run.
        prepared: what the prepare stage said.
        labels: names in the order of the model's outputs; None for regression.
        architecture: class name of the model.
        per_class: label, precision, recall, F1 and number of examples, of the evaluation set.
        versions: of what trained it, by name.
        record: `record.json` of the run; empty where it has none.
        parameters: how many the model has.
        onnx: `onnx/model.onnx` is there.
    """

    plan: Plan
    outcome: Outcome
    prepared: Mapping[str, Any]
    labels: Sequence[str] | None
    architecture: str
    per_class: Sequence[tuple[str, float, float, float, int]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    parameters: int = 0
    onnx: bool = False


def facts_of(run: RunDir, outcome: Outcome) -> Facts:
    """Read them. Weights are looked at by their header alone."""
    config = read_json(run.model / "config.json")
    names = [str(name) for _, name in sorted((config.get("id2label") or {}).items(), key=lambda pair: int(pair[0]))]
    labels = None if outcome.task == "regression" else names
    return Facts(
        plan=run.plan(),
        outcome=outcome,
        prepared=run.prepared(),
        labels=labels,
        architecture=next(iter(config.get("architectures") or []), "a sequence classifier"),
        per_class=_per_class(run, outcome.task, labels),
        versions=_versions(run, outcome),
        record=read_json(run.path / "record.json"),
        parameters=_parameters(run.model),
    )


def model_card(facts: Facts) -> str:
    """The whole README.md. Secrets are blackened."""
    from huggingface_hub import ModelCardData

    recipe = facts.plan.recipe
    about = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=recipe.model if _on_hub(facts) else None,
        datasets=[recipe.data.hub] if recipe.data.hub else None,
        metrics=_metric_ids(facts) or None,
        model_name=recipe.name,
        eval_results=_results(facts) or None,
        tags=["afina"],
    )
    parts = [
        f"# {recipe.name}",
        _summary(facts),
        "## How to use it",
        _use(facts),
        *(["## Labels", _labels(facts.labels)] if facts.labels else []),
        "## How well it does",
        _evaluation(facts),
        "## How it was trained",
        _training(facts),
        "## What it is for, and what it is not for",
        f"{_OPEN} which texts it was made for, who should and should not use it, what a wrong answer would cost.",
        "## Limits and biases",
        _limits(facts),
        "## License",
        f"{_OPEN} the license of these weights (it must fit that of the base model and of the data), as `license:` in the "
        "metadata above too, and the `language:` of the texts.",
    ]
    return redact(f"---\n{about.to_yaml().rstrip()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _summary(facts: Facts) -> str:
    recipe, labels = facts.plan.recipe, facts.labels
    what = _TASK_WORDS[facts.outcome.task or "single-label"].format(n=len(labels or ()))
    base = (
        f"[{recipe.model}](https://huggingface.co/{recipe.model})" if _on_hub(facts) else f"`{Path(recipe.model).name}`"
    )
    size = f", {_count(facts.parameters)} parameters" if facts.parameters else ""
    pairs = " Each example is a pair of texts." if len(recipe.data.text) == 2 else ""
    return f"`{facts.architecture}`{size}: {what}. It is {base}, fine-tuned with afina on {_data_name(facts)}.{pairs}"


def _count(count: int) -> str:
    """22.7 million, or all digits of a small number."""
    return f"{count / 1e6:,.1f} million" if count >= 1_000_000 else f"{count:,}"


def _use(facts: Facts) -> str:
    recipe = facts.plan.recipe
    call = 'classify({"text": "…", "text_pair": "…"}, ' if len(recipe.data.text) == 2 else 'classify("…", '
    lines = [
        "```python",
        "from transformers import pipeline",
        "",
        'classify = pipeline("text-classification", model="PATH_OR_HUB_ID")',
        f"print({call}truncation=True, top_k=None))",
        "```",
        "",
        f"Texts are cut after {recipe.tokens.max_length} tokens, as in training. For many texts, `afina predict` with this folder "
        "computes no padding and can be interrupted.",
    ]
    if facts.onnx:
        lines += ["", "`onnx/model.onnx` is the same model for ONNX Runtime; its outputs were compared with PyTorch's."]
    return "\n".join(lines)


def _labels(labels: Sequence[str]) -> str:
    shown = ", ".join(f"`{label}`" for label in labels[:50])
    return shown + (f", and {len(labels) - 50} more (see `config.json`)" if len(labels) > 50 else "")


def _evaluation(facts: Facts) -> str:
    metrics = {k: v for k, v in facts.outcome.metrics.items() if isinstance(v, _SCALARS)}
    parts = [part for part in ("eval", "test") if any(name.startswith(f"{part}_") for name in metrics)]
    names = list(dict.fromkeys(name.partition("_")[2] for name in metrics))
    rows = facts.prepared.get("rows", {})
    lines = ["| metric | " + " | ".join(f"{part} ({rows.get(part, 0):,} rows)" for part in parts) + " |"]
    lines.append("|---|" + "---|" * len(parts))
    for name in names:
        cells = [metrics.get(f"{part}_{name}") for part in parts]
        lines.append(f"| {name} | " + " | ".join("-" if v is None else f"{v:.4f}" for v in cells) + " |")
    said = ["\n".join(lines)]
    if facts.labels and {"f1", "precision", "recall"} & set(names):
        said.append("Precision, recall and F1 are means over the labels (macro).")
    if facts.plan.recipe.train.keep == "best":
        said.append(
            "The checkpoint was chosen by its metric on the evaluation set, which is therefore a little too kind to it."
        )
    if facts.per_class:
        table = ["| label | precision | recall | F1 | examples |", "|---|---|---|---|---|"]
        table += [f"| {_cell(n)} | {p:.3f} | {r:.3f} | {f:.3f} | {count:,} |" for n, p, r, f, count in facts.per_class]
        said += ["On the evaluation set, by label:", "\n".join(table)]
    return "\n\n".join(said)


def _training(facts: Facts) -> str:
    recipe, outcome = facts.plan.recipe, facts.outcome
    train, rows, tokens = recipe.train, facts.prepared.get("rows", {}), facts.prepared.get("tokens", {})
    speed = f", {outcome.samples_per_second:,.1f} examples/s" if outcome.samples_per_second else ""
    length = f"{train.num_epochs:g} epochs" if train.max_steps is None else f"at most {train.max_steps:,} steps"
    table: dict[str, Any] = {
        "data": _data_name(facts),
        "examples": ", ".join(f"{part} {count:,}" for part, count in rows.items()),
        "tokens": ", ".join(f"{part} {count:,}" for part, count in tokens.items()),
        "cut after": f"{recipe.tokens.max_length} tokens",
        "asked for": length,
        "optimizer steps": f"{outcome.global_step:,}; the weights are those of step {outcome.model_step or outcome.global_step:,}",
        "examples per step": train.batch_size,
        "learning rate": f"{train.learning_rate:g}, {train.arguments.get('lr_scheduler_type', 'linear')} schedule",
        "seed": train.seed,
        **{f"`{name}`": value for name, value in train.arguments.items() if name != "lr_scheduler_type"},
        "ran on": f"{outcome.world_size or 1} process(es), {outcome.device or 'cpu'}; {outcome.seconds:,.0f} s in "
        f"{outcome.attempts} attempt(s){speed}",
        "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        **_origins(facts),
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in table.items() if value not in ("", None)]
    return "\n".join(["| | |", "|---|---|", *lines])


def _origins(facts: Facts) -> dict[str, str]:
    """Commits and digests, as far as the run has recorded them."""

    def at(*keys: str) -> Any:
        value: Any = facts.record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    git = at("git", "commit")
    found = {
        "base model's commit": facts.prepared.get("model_commit"),
        "data set's commit": facts.prepared.get("data_commit"),
        "prepared data": facts.prepared.get("digest"),
        "image (SHA-256)": at("image", "sha256"),
        "git commit": f"{git}, with changes that were not committed" if git and at("git", "diff_sha256") else git,
    }
    return {name: f"`{value}`" for name, value in found.items() if value}


def _limits(facts: Facts) -> str:
    said = []
    if facts.labels and facts.per_class:
        weak = [name for name, *_, f1, count in facts.per_class if f1 < 0.5 and count]
        if weak:
            said.append(f"F1 is below 0.5 on the evaluation set for: {', '.join(f'`{name}`' for name in weak[:20])}.")
        few = [name for name, *_, count in facts.per_class if count < 30]
        if few:
            said.append(
                f"Fewer than 30 examples of the evaluation set have: {', '.join(f'`{name}`' for name in few[:20])}."
            )
    said.append(f"{_OPEN} whom the texts come from and whom they leave out, known failures, how labels were made.")
    return "\n\n".join(said)


# -- metadata ---------------------------------------------------------------------------------------------------------


def _on_hub(facts: Facts) -> bool:
    return facts.plan.model_folder is None and bool(_HUB_ID.fullmatch(facts.plan.recipe.model))


def _data_name(facts: Facts) -> str:
    data = facts.plan.recipe.data
    if data.hub:
        return f"[{data.hub}](https://huggingface.co/datasets/{data.hub})" + (
            f" ({data.config})" if data.config else ""
        )
    names = list(dict.fromkeys(path.name for paths in facts.plan.files.values() for path in paths))
    return ", ".join(f"`{_cell(name)}`" for name in names[:5]) + (
        f" and {len(names) - 5} files more" if len(names) > 5 else ""
    )


def _metric_ids(facts: Facts) -> list[str]:
    """Names of metrics as the Hub knows them."""
    known = {"accuracy": "accuracy", "f1": "f1", "precision": "precision", "recall": "recall", "mcc": "matthews_correlation",
             "mse": "mse", "mae": "mae", "pearson": "pearsonr", "spearman": "spearmanr"}  # fmt: skip
    names = [name.partition("_")[2] for name in facts.outcome.metrics]
    return list(dict.fromkeys(known[name] for name in names if name in known))


def _results(facts: Facts) -> list[Any]:
    """`model-index`: the metrics of the evaluation set, and of the test set if there is one."""
    from huggingface_hub import EvalResult

    data, found = facts.plan.recipe.data, []
    names = [path.name for paths in facts.plan.files.values() for path in paths]
    for name, value in facts.outcome.metrics.items():
        part, _, metric = name.partition("_")
        if not isinstance(value, _SCALARS) or metric == "loss":
            continue
        found.append(
            EvalResult(
                task_type="text-classification",
                task_name="Text Classification",
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
    return found


# -- what the run directory says --------------------------------------------------------------------------------------


def _per_class(
    run: RunDir, task: str | None, labels: Sequence[str] | None
) -> list[tuple[str, float, float, float, int]]:
    """Precision, recall, F1 and support of each label on the evaluation set, from `predictions.parquet`."""
    if labels is None or not run.predictions.is_file():
        return []
    import numpy as np
    import pyarrow.parquet as pq
    from sklearn.metrics import precision_recall_fscore_support

    table = pq.read_table(run.predictions, columns=["label", "prediction"])
    told, said = table.column("label").to_pylist(), table.column("prediction").to_pylist()
    if task == "multi-label":
        told, said = (np.array([[name in row for name in labels] for row in side], int) for side in (told, said))
        scores = precision_recall_fscore_support(told, said, average=None, zero_division=0)
    else:
        scores = precision_recall_fscore_support(told, said, labels=list(labels), average=None, zero_division=0)
    return [(name, float(p), float(r), float(f), int(n)) for name, p, r, f, n in zip(labels, *scores, strict=True)]


def _versions(run: RunDir, outcome: Outcome) -> dict[str, str]:
    """Of what trained: the last attempt's environment, and what its checkpoints say."""
    env = read_json(run.attempts / outcome.attempt / "env.json")
    found = {name: env[name] for name in ("afina", "python") if isinstance(env.get(name), str)}
    for manifest in sorted(run.checkpoints.glob("step-*/manifest.json"), key=lambda path: path.stat().st_mtime):
        found |= {name: str(version) for name, version in (read_json(manifest).get("versions") or {}).items()}
    return found


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
    """Text that stays within a cell of a table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
