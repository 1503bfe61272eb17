"""How a run was made, in words: a methods paragraph for a paper, and the facts in which two runs may differ.

Every fact is from the run directory; one that was not recorded is left out. Not covered: what the author alone knows (who labelled
the data, why these texts).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.files import read_json
from afina.recipe.keys.data_keys import Part
from afina.recipe.keys.loss_keys import DEFAULT_GAMMA
from afina.recipe.keys.train_keys import Train
from afina.recipe.metrics import lower_is_better, metric_name, selection_metric
from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.run.plan import Plan
from afina.statistics.decision_rule import described
from afina.text import plural

__all__ = ["execution_differences", "execution_of", "features_of", "methods", "trained_count"]

_TASKS = {
    "single-label": "single-label classification",
    "multi-label": "multi-label classification",
    "token-classification": "token classification",
}


#: The loss of each task (`afina.worker.task.losses`), and what it is of.
_LOSSES = {
    "single-label": ("cross entropy", ""),
    "multi-label": ("binary cross entropy", " of each label"),
    "token-classification": ("cross entropy", " of each word"),
    "regression": ("squared error", ""),
}


def execution_of(run: RunDir) -> dict[str, str]:
    """Software and hardware of the newest attempt: versions, processor, GPUs, precision, processes."""
    known = [read_json(run.attempts / name / "env.json") for name in reversed(run.attempt_names())]
    env = next((one for one in known if one.get("versions")), {})
    hardware, geometry = env.get("hardware") or {}, env.get("geometry") or {}
    events = [event for event in run.lines("events.jsonl") if event.get("event") == "precision"]
    precision, device = (events[-1] if events else {}), {}
    if isinstance(precision.get("device"), Mapping):
        device = precision["device"]
    outcome = read_json(run.outcome_file)
    processes = outcome.get("world_size") or (geometry.get("nodes", 0) * geometry.get("processes_per_node", 0))
    # Without a precision of afina's choosing the recipe's own arguments set it.
    facts = {
        "processes": processes,
        "device": outcome.get("device"),
        "GPU": device.get("name") if device.get("kind") == "cuda" else ", ".join(hardware.get("gpus") or []),
        "GPU driver": hardware.get("driver"),
        "processor": hardware.get("cpu"),
        "precision": precision.get("precision"),
        "attention": precision.get("attention"),
        "compiled": "yes" if precision.get("compile") else None,
        "Python": env.get("python"),
        **(env.get("versions") or {}),
    }
    return {name: str(value) for name, value in facts.items() if value}


def execution_differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The differences of two executions, in words; what one of them lacks is not compared."""
    return [f"{name}: {then[name]} then, {now[name]} now" for name in then if name in now and then[name] != now[name]]


def methods(
    plan: Plan, outcome: Outcome | None, prepared: Mapping[str, Any], record: Mapping[str, Any], ran: Mapping[str, str]
) -> str:
    """A paragraph that a paper can quote.

    Args:
        prepared: `prepared.json`.
        record: `record.json`.
        ran: see `execution_of`.
    """
    sentences = [
        _model_and_data(plan, prepared, record),
        _splits(plan, prepared),
        _training(plan, outcome),
        _loss(plan, prepared),
        _machine(plan, ran),
    ]
    sentences += [
        _choice(plan, outcome, prepared),
        *described(outcome.decisions if outcome else {}),
        _simple(outcome),
    ]
    return " ".join(filter(None, sentences))


def _model_and_data(plan: Plan, prepared: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    recipe, data = plan.recipe, plan.recipe.data
    task, labels = str(prepared.get("task") or recipe.task), prepared.get("labels") or []
    named = f" ({plural(len(labels), 'label')})" if labels else ""
    what = f"{_TASKS.get(task, task)}{named}"
    model = Path(recipe.model).name if plan.model_folder else recipe.model
    if commit := prepared.get("model_commit"):
        model += f" (revision {commit})"
    elif files := (record.get("model") or {}).get("files"):
        model += f" (local files; SHA-256 of the weights {_weights(files)})"
    source = f"{data.hub}{f' ({data.config})' if data.config else ''}" if data.hub else _files(plan)
    if commit := prepared.get("data_commit"):
        source += f" (revision {commit})"
    digest = f"; the prepared data has the SHA-256 {prepared['digest']}" if prepared.get("digest") else ""
    return f"We fine-tuned {model} for {what} on {source}{digest}, with afina {plan.afina_version}."


def _weights(files: Mapping[str, Any]) -> str:
    weights = [about for name, about in files.items() if name.endswith((".safetensors", ".bin"))]
    digests = [str(about.get("sha256") if isinstance(about, Mapping) else about) for about in weights]
    return ", ".join(digests[:2]) or "unknown"


def _files(plan: Plan) -> str:
    names = list(dict.fromkeys(path.name for paths in plan.files.values() for path in paths))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more files" if len(names) > 5 else "")


def _splits(plan: Plan, prepared: Mapping[str, Any]) -> str:
    rows, data = prepared.get("rows") or {}, plan.recipe.data
    parts = []
    divided = "by a hash of the text" if data.split_by else "stratified"
    if data.group is not None:
        divided = f"whole groups (column {data.group}), stratified"
    if data.fold is not None:
        whole = f", whole groups (column {data.group})" if data.group else ""
        fold = f"stratified fold {data.fold.number} of {data.fold.of}{whole}, seed {data.train.seed + data.fold.repeat - 1}"
        test = f"; test {plural(rows['test'], 'row')}" if "test" in rows else ""
        counts = (
            f"train {plural(rows.get('train', 0), 'row')}; eval {plural(rows.get('eval', 0), 'row')} ({fold}){test}"
        )
        return f"Splits: {counts}. Texts were cut {plan.recipe.tokens.cut}."
    if data.split_column:
        divided += f", column {data.split_column}"
    for name in ("train", "eval", "test"):
        part: Part | None = getattr(data, name)
        if name in rows and part is not None:
            drawn = " by a hash of the text" if data.split_by and (part.fraction or data.hub is None) else ""
            how = [
                f"a fraction of {part.fraction:g}, {divided}, seed {part.seed}" if part.fraction else "",
                f"a sample of {part.sample:,}{drawn}, seed {part.seed}" if part.sample else "",
                f"split {part.split}" if part.split else "",
            ]
            about = ", ".join(filter(None, how))
            groups = (prepared.get("groups") or {}).get(name)
            of = f" of {groups:,} groups" if groups else ""
            parts.append(f"{name} {plural(rows[name], 'row')}{of}{f' ({about})' if about else ''}")
    cut = f"Texts were cut {plan.recipe.tokens.cut}."
    return f"Splits: {'; '.join(parts)}. {cut}" if parts else cut


def _training(plan: Plan, outcome: Outcome | None) -> str:
    train = plan.recipe.train
    given = dict(train.arguments)
    optimizer = str(given.pop("optim", "adamw_torch"))
    name = "AdamW" if optimizer.startswith("adamw_torch") else optimizer
    betas = (
        f"β1 {given.pop('adam_beta1', 0.9)}, β2 {given.pop('adam_beta2', 0.999)}, ε {given.pop('adam_epsilon', 1e-8):g}"
    )
    schedule = str(given.pop("lr_scheduler_type", "linear"))
    decay, clip = given.pop("weight_decay", 0.0), given.pop("max_grad_norm", 1.0)
    steps = f" ({plural(outcome.global_step, 'step')}{outcome.ended_early})" if outcome and outcome.global_step else ""
    more = "".join(f", {key} {value}" for key, value in sorted(given.items()))
    return (
        f"{_trained(plan, outcome)}Optimizer: {name} ({betas}, weight decay {decay:g}, gradients clipped at {clip:g}); learning rate {train.learning_rate:g}{_rates(train)}, "
        f"{schedule} schedule{more}; {plural(train.batch_size, 'example')} per step, {train.length}{steps}, seed {train.seed}."
    )


def _trained(plan: Plan, outcome: Outcome | None) -> str:
    recipe = plan.recipe
    share = f" ({trained_count(outcome)})"
    if adapter := recipe.adapter:
        stored = "" if recipe.train.base_dtype == "fp32" else f" and stored in {recipe.train.base_dtype}"
        return (
            f"Trained were {adapter.variant} adapters of rank {adapter.rank} (α {adapter.alpha:g}, dropout {adapter.dropout:g}) on {adapter.layers}, and the "
            f"head{share}; all other weights were frozen{stored}. "
        )
    return (
        f"Frozen were {recipe.train.frozen}; trained was the rest{share}. " if recipe.train.freeze is not None else ""
    )


def _loss(plan: Plan, prepared: Mapping[str, Any]) -> str:
    train, task = plan.recipe.train, str(prepared.get("task") or plan.recipe.task)
    if task not in _LOSSES:
        return ""
    gamma = DEFAULT_GAMMA if train.focal_gamma is None else train.focal_gamma
    kind, of = _LOSSES[task]
    more = [f"{kind}{of}" if train.loss != "focal" else f"focal loss{of} (γ {gamma:g})"]
    for key, given in (("class weights", train.class_weights), ("weights of positives", train.pos_weight)):
        if given is not None:
            each = "balanced" if given == "balanced" else ", ".join(f"{name}: {w:g}" for name, w in given.items())
            more.append(f"{key} ({each})")
    if train.label_smoothing:
        more.append(f"label smoothing {train.label_smoothing:g}")
    if plan.recipe.data.weight is not None:
        more.append(f"rows weighted by column {plan.recipe.data.weight}")
    return f"Loss: {'; '.join(more)}."


def trained_count(outcome: Outcome | None) -> str:
    """How many of the model's parameters were trained, in words."""
    if outcome is None or not outcome.trained_parameters:
        return "their number is not known"
    return f"{outcome.trained_parameters:,} of {outcome.parameters:,} parameters"


def _rates(train: Train) -> str:
    """The learning rates beside that of the recipe."""
    head = "" if train.head_learning_rate is None else f", of the head {train.head_learning_rate:g}"
    return head + (f", times {train.layer_decay:g} for each layer down" if train.layer_decay != 1 else "")


def _machine(plan: Plan, ran: Mapping[str, str]) -> str:
    if not ran:
        return ""
    where = ran.get("GPU") if ran.get("device", "cuda") == "cuda" and ran.get("GPU") else ran.get("processor") or "CPU"
    precision = f"in {ran['precision']}" if "precision" in ran else f"in precision {plan.recipe.train.precision}"
    count = int(ran.get("processes", "1"))
    names = {"torch": "PyTorch", "transformers": "Transformers", "accelerate": "Accelerate", "tokenizers": "Tokenizers"}
    versions = [f"{names.get(name, name)} {ran[name]}" for name in ("Python", *names) if name in ran]
    sharded = (
        ", among which the model was sharded (FSDP2)," if plan.recipe.train.sharding != "none" and count > 1 else ""
    )
    ran_on = f"It was trained {precision} with {plural(count, 'process', 'processes')}{sharded} on {where}"
    return f"{ran_on} ({', '.join(versions)})." if versions else f"{ran_on}."


def _simple(outcome: Outcome | None) -> str:
    """The simple models that were trained beside it, and their first score on the last split."""
    split, models = next(reversed((outcome.baselines if outcome else {}).items()), ("", []))
    named = [(model, model["differences"][0]) for model in models[1:] if model["differences"]]
    scores = [
        f"{model['name']} (scikit-learn's defaults, {features_of(model)}, {plural(model['rows'], 'row')} of train) had {d['metric']} {d['first']:.4g} on "
        f"{_rows_of(model, split)}, this model {d['second']:.4g}."
        for model, d in named
    ]
    return f"For comparison, {' '.join(scores)}" if scores else ""


def features_of(model: Mapping[str, Any]) -> str:
    """The training data of a simple model, in words that follow its name."""
    return str(model.get("features", "over tokens and pairs of them"))


def _rows_of(model: Mapping[str, Any], split: str) -> str:
    compared, of = model.get("compared", (0, 0))
    return split if compared == of else f"{plural(compared, 'row')} of {split}"


def _choice(plan: Plan, outcome: Outcome | None, prepared: Mapping[str, Any]) -> str:
    train, task = plan.recipe.train, str(prepared.get("task") or plan.recipe.task)
    rows = prepared.get("rows") or {}
    if "eval" not in rows:
        return "The weights are those of the last step."
    test = " Test rows took no part in the choice." if "test" in rows else ""
    if train.keep != "best":
        return f"The weights are those of the last step.{test}"
    known = task in ("single-label", "multi-label", "regression", "token-classification")
    best = metric_name(train.best_metric) if train.best_metric else selection_metric(task) if known else "the metric"
    better = "lowest" if lower_is_better(best, plan.recipe.metric_texts) else "highest"
    step = f" (step {outcome.model_step:,})" if outcome and outcome.model_step else ""
    return f"The checkpoint with the {better} {best} on eval was kept{step}, so that scores on eval are a little too kind.{test}"
