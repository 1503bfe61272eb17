"""Pure: from a look into the data and at the cluster to the text of a recipe and of a site file, with the reasons as comments.

The rules are ordinary practice, not laws, and every one is said beside what it led to. Nothing here reads a file.

    max_length   the least multiple of 16 that holds 99 % of the texts whole, within the model's positions
    metrics      macro F1 first where the largest class has three times the rows of the smallest
    epochs       5 below 1,000 rows, 3 below 50,000, 2 below 500,000, else 1
    batch_size   8 below 500 rows, 16 below 20,000, else 32
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from afina.recipe.metrics import selection_metric
from afina.slurm.cluster import Cluster, Nodes, Partition
from afina.start.examine import Examined, quantile
from afina.text import minutes_in_words

__all__ = [
    "DEFAULT_MODEL",
    "Host",
    "Model",
    "MULTILINGUAL_MODEL",
    "Proposal",
    "about_data",
    "recipe_text",
    "site_text",
    "usable_partition",
]

DEFAULT_MODEL = "google-bert/bert-base-cased"
MULTILINGUAL_MODEL = "FacebookAI/xlm-roberta-base"
#: Tokens that a word or mark becomes. Measured: 1.03 to 1.10 for English reviews and BERT's uncased vocabulary; others take more.
_TOKENS_PER_PIECE = 1.25
_SPECIAL = 2
_UNEVEN = 3.0
#: Floating-point operations per second that a first guess of the time assumes; `afina rehearse` measures.
_CPU_RATE, _GPU_RATE = 25e9, 15e12
_START_MIN = 10


@dataclass(frozen=True)
class Model:
    """What is known of the model. `measured`: token counts by pieces were measured with its tokenizer."""

    id: str
    parameters: int = 110_000_000
    positions: int = 512
    known: bool = False
    tokens_per_piece: float | None = None


@dataclass(frozen=True)
class Proposal:
    """What the recipe is written from.

    Attributes:
        files: part -> paths as the recipe writes them; empty for a Hub data set.
        parts: part -> the split or file key it is cut from, where that is not its own name.
        examined: of what training rows come from; `others` of the other parts that have their own.
        shared: texts of an eval or test part that are in train too.
    """

    name: str
    model: Model
    text: tuple[str, ...]
    label: tuple[str, ...]
    examined: Examined
    others: Mapping[str, Examined]
    files: Mapping[str, tuple[str, ...]]
    hub: str | None = None
    config: str | None = None
    parts: Mapping[str, str] | None = None
    id: str | None = None
    shared: int = 0
    gpus: int = 0
    cpus: int = 4
    node_mem_gb: int | None = None
    limit_min: int | None = None


@dataclass(frozen=True)
class Host:
    """What the machine says: scratch, the image (None: none), what starts it, a module that must be loaded for that; and why."""

    scratch: str
    scratch_why: str
    image: str | None
    image_why: str
    runtime: str
    module: str | None = None


# -- the recipe -------------------------------------------------------------------------------------------------------


def recipe_text(p: Proposal) -> str:
    """The recipe as YAML. Raises nothing: what looks doubtful is said in a comment."""
    x = p.examined
    lines: list[str] = []

    def add(line: str = "", *why: str) -> None:
        lines.extend(f"# {' '.join(reason.split())}" for reason in why)
        lines.append(line) if line else None

    train_rows, parts, split_why = _parts(p)
    tokens = _tokens(p)
    length, cut = _max_length(tokens, p.model.positions)
    regression = x.numeric and not x.whole_numbers
    multiple = x.multiple or x.separator is not None
    epochs, batch = _epochs(train_rows), _batch(train_rows)
    steps = math.ceil(train_rows / batch) * epochs
    mean_tokens = sum(min(n, length) for n in tokens) / max(1, len(tokens))
    flops = 6 * p.model.parameters * mean_tokens * train_rows * epochs

    add("", "Proposed by `afina init` from a look at the data; change what you know better. Keys: docs/recipe.md")
    add(f"name: {_yaml(p.name)}")
    known = f"{p.model.parameters / 1e6:.0f} million parameters, {p.model.positions} positions" if p.model.known else ""
    add(f"model: {_yaml(p.model.id)}", *([known] if known else []))
    add("data:", *about_data(p))
    if p.hub:
        add(f"  hub: {_yaml(p.hub)}")
        if p.config:
            add(f"  config: {_yaml(p.config)}")
    else:
        files = ", ".join(f"{part}: {_flow(paths)}" for part, paths in p.files.items())
        add(f"  files: {{{files}}}")
    add(f"  text: {_flow(p.text)}")
    for why in _about_labels(x):
        lines.append(f"  # {' '.join(why.split())}")
    add(f"  label: {_flow(p.label)}")
    if x.separator is not None:
        add(f"  label_separator: {_yaml(x.separator)}")
    if p.id:
        add(f"  id: {_yaml(p.id)}            # is carried into the predictions")
    lines.append(f"  # {split_why}")
    lines.extend(f"  {part}: {spec}" for part, spec in parts.items())
    add(f"tokens: {{max_length: {length}}}", *_about_length(p, tokens, length, cut))
    rate = 3e-5 if p.model.parameters > 60e6 else 5e-5
    every = f", save_every: {500}" if steps / max(1, epochs) > 500 else ""
    add(
        "train:",
        f"{train_rows:,} rows to train on: {epochs} epochs of {math.ceil(train_rows / batch):,} steps, {steps:,} in all",
    )
    metrics, best, metric_why = _metrics(x, regression, multiple)
    add(f"  batch_size: {batch}            # global: examples per optimizer step, on one GPU or on eight")
    add(f"  epochs: {epochs}")
    add(f"  learning_rate: {rate:.1e}".replace("e-0", "e-"))
    if every:
        lines.append("  # an epoch is long: a killed job repeats 500 steps at most")
        add("  save_every: 500")
    add(f"  best_metric: {best}")
    add("  arguments: {warmup_steps: 0.06, weight_decay: 0.01}")
    add(f"metrics: [{', '.join(metrics)}]", metric_why)
    minutes, why = _time(p, flops)
    memory = _memory(p)
    add(
        f"resources: {{nodes: 1, gpus_per_node: {p.gpus}, cpus_per_gpu: {p.cpus}, mem_gb: {memory}, time: {minutes}}}",
        why,
    )
    return "\n".join(lines) + "\n"


def _parts(p: Proposal) -> tuple[int, dict[str, str], str]:
    """Rows to train on, the parts as YAML, and why they are cut so."""
    there = dict(p.parts or {})
    rows = p.examined.rows
    if "eval" in there:
        named = {part: _part(part, source) for part, source in there.items()}
        return rows, named, f"the data come in parts: {', '.join(there)}"
    if "test" in there:
        train = math.floor(rows * 0.9)
        source = there["train"]
        cut = {
            name: f"{{split: {_yaml(source)}, fraction: {share}, seed: 42}}"
            for name, share in (("train", 0.9), ("eval", 0.1))
        }
        return (
            train,
            {**cut, "test": _part("test", there["test"])},
            "a test part, and no eval part: a tenth of train is kept for it",
        )
    shares = {"train": 0.8, "eval": 0.1, "test": 0.1} if rows >= 5000 else {"train": 0.8, "eval": 0.2}
    spec = {name: f"{{fraction: {share}, seed: 42}}" for name, share in shares.items()}
    return math.floor(rows * 0.8), spec, "one source: cut by label, disjoint, the same with the same seed"


def _part(part: str, source: str) -> str:
    return "{}" if source == part else f"{{split: {_yaml(source)}}}"


def about_data(p: Proposal) -> list[str]:
    """What was noticed about the rows; what needs a look begins with WARNING."""
    x = p.examined
    about = "about " if not x.whole else ""
    said = [f"{about}{x.rows:,} rows; a text has {x.characters:.0f} characters on average"]
    if x.num_empty:
        have = "row has" if x.num_empty == 1 else "rows have"
        said.append(
            f"WARNING: {x.num_empty:,} {have} an empty text ({_listed(x.empty)}): afina prefetch refuses that; remove them"
        )
    if x.num_missing:
        have = "row has" if x.num_missing == 1 else "rows have"
        said.append(
            f"WARNING: {x.num_missing:,} {have} no label ({_listed(x.missing)}): afina prefetch refuses that; remove them"
        )
    if x.duplicates:
        are = "text is" if x.duplicates == 1 else "texts are"
        said.append(
            f"{x.duplicates:,} {are} there more than once: cut apart, one may be trained on and the other tested"
        )
    if p.shared:
        are = "text" if p.shared == 1 else "texts"
        said.append(f"WARNING: {p.shared:,} {are} of the other parts are in train too: the score will be too good")
    return said


def _listed(rows: Sequence[int]) -> str:
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}{', …' if len(rows) == 5 else ''}"


def _about_labels(x: Examined) -> list[str]:
    if x.numeric and not x.whole_numbers:
        return ["numbers, some of them not whole: a regression"]
    counts = sorted(x.labels.values(), reverse=True)
    if not counts:
        return []
    shown = ", ".join(f"{_short(name)} {count:,}" for name, count in list(x.labels.items())[:8])
    more = f", … {len(counts) - 8} more" if len(counts) > 8 else ""
    said = [f"{len(counts)} labels: {shown}{more}"]
    rare = sum(count < 10 for count in counts)
    if rare:
        said.append(f"{rare} of them have fewer than 10 rows: little can be learnt or said about those")
    if len(counts) > 200:
        said.append("WARNING: so many labels are unusual: is this the label column?")
    if x.numeric:
        said.append("whole numbers are taken as classes; with `task: regression` their order counts")
    return said


def _short(name: str) -> str:
    shown = " ".join(name.split())
    return repr(shown if len(shown) <= 24 else shown[:23] + "…")


def _tokens(p: Proposal) -> list[int]:
    """Tokens of each text that was read, ascending: measured by the model's tokenizer, or told from words and marks."""
    factor = p.model.tokens_per_piece or _TOKENS_PER_PIECE
    special = _SPECIAL + (len(p.text) - 1)
    return [math.ceil(n * factor) + special for n in p.examined.pieces]


def _max_length(tokens: Sequence[int], positions: int) -> tuple[int, float]:
    """The length, and the share of texts that it cuts."""
    length = max(16, math.ceil(quantile(tokens, 0.99) / 16) * 16)
    length = min(length, positions)
    return length, sum(n > length for n in tokens) / max(1, len(tokens))


def _about_length(p: Proposal, tokens: Sequence[int], length: int, cut: float) -> list[str]:
    how = (
        "by the model's tokenizer"
        if p.model.tokens_per_piece
        else f"told from words and marks, {_TOKENS_PER_PIECE} tokens each"
    )
    half, most, longest = quantile(tokens, 0.5), quantile(tokens, 0.99), tokens[-1] if tokens else 0
    said = [f"tokens per text ({how}): half have up to {half}, 99 % up to {most}, the longest {longest}"]
    if cut:
        limit = f", and the model has {p.model.positions} positions" if length == p.model.positions else ""
        said.append(
            f"{cut:.1%} of the texts will be cut at {length}{limit}; padding costs nothing, so a larger number is free for the others"
        )
    return said


def _epochs(rows: int) -> int:
    return 5 if rows < 1000 else 3 if rows < 50_000 else 2 if rows < 500_000 else 1


def _batch(rows: int) -> int:
    return 8 if rows < 500 else 16 if rows < 20_000 else 32


def _metrics(x: Examined, regression: bool, multiple: bool) -> tuple[list[str], str, str]:
    """Metrics, the one that chooses the best checkpoint, and why."""
    if regression:
        return ["mse", "mae", "pearson"], selection_metric("regression"), "of a regression"
    counts = sorted(x.labels.values())
    if multiple:
        return (
            ["f1", "f1_micro", "subset_accuracy"],
            "f1",
            "several labels per row: F1, averaged over labels and over all",
        )
    if counts and counts[-1] >= _UNEVEN * counts[0]:
        share = counts[-1] / sum(counts)
        why = f"the largest class has {counts[-1] / counts[0]:.1f} times the rows of the smallest ({share:.0%} of all): macro F1 counts each class alike"
        return ["f1", "accuracy", "confusion_matrix"], "f1", why
    return (
        ["accuracy", "f1", "confusion_matrix"],
        "accuracy",
        "the classes are of like size: accuracy says what it seems to say",
    )


def _time(p: Proposal, flops: float) -> tuple[str, str]:
    """Time to ask for, and how it was guessed."""
    rate = _GPU_RATE * p.gpus if p.gpus else _CPU_RATE * p.cpus
    minutes = _START_MIN + 2 * flops / rate / 60
    unit = 10 if minutes <= 60 else 30 if minutes <= 480 else 60
    asked = math.ceil(minutes / unit) * unit
    device = f"{p.gpus} GPU" if p.gpus else f"{p.cpus} cores"
    why = f"a guess from {flops:.1e} floating-point operations on {device}; `afina rehearse` measures it"
    if p.limit_min is not None and asked > p.limit_min:
        why += f"; the partition allows {minutes_in_words(p.limit_min)}, and the run goes on in another job after that"
        asked = p.limit_min
    return f"{asked // 60}:{asked % 60:02d}:00", why


def _memory(p: Proposal) -> int:
    """GB per node: libraries, weights, gradients, moments, the copy of a save, and as much for activations; at least 4."""
    state = 28.0 * p.model.parameters
    wanted = max(4, math.ceil((1e9 + (1e9 if p.gpus else 0.0) + 1.5 * state) / 1e9))
    return min(wanted, p.node_mem_gb) if p.node_mem_gb else wanted


def _flow(values: Sequence[str]) -> str:
    return _yaml(values[0]) if len(values) == 1 else f"[{', '.join(map(_yaml, values))}]"


def _yaml(text: str) -> str:
    """A YAML scalar: plain where it cannot be taken for anything else, else JSON's quotes, which YAML 1.2 reads."""
    if re.fullmatch(r"[A-Za-z_./][\w./@+-]*( [\w./@+-]+)*", text, re.ASCII) and text.lower() not in _WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)


_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n", ".nan", ".inf", ".")


# -- the site ---------------------------------------------------------------------------------------------------------


def usable_partition(cluster: Cluster) -> Partition | None:
    """The partition to propose: the default one if it has GPUs or none has, else the first that is up and has some."""
    default = cluster.default or (cluster.partitions[0] if cluster.partitions else None)
    if default is None or default.gpus_per_node:
        return default
    return next((p for p in cluster.partitions if p.up and p.gpus_per_node), default)


def site_text(host: Host, cluster: Cluster) -> str:
    """The site file, for bash to read."""
    plain = re.fullmatch(r"[\w./@+-]+", host.scratch, re.ASCII)
    scratch = shlex.quote(host.scratch)
    lines = [
        "# Where afina runs, proposed by `afina init` from what this machine and its cluster say. bash reads it, on the login node",
        "# and in the job; docs/site.md describes it. It names your account: keep it out of git.",
        "",
        f"# {host.scratch_why}",
        f': "${{AFINA_SCRATCH:={host.scratch}}}"'
        if plain
        else f'[ -n "${{AFINA_SCRATCH:-}}" ] || AFINA_SCRATCH={scratch}',
        "",
        f"# {host.image_why}",
        f"AFINA_IMAGE={shlex.quote(host.image) if host.image else ''}",
        f"AFINA_RUNTIME={host.runtime}",
    ]
    if host.module:
        lines += ["", f"# {host.runtime} is not on PATH, and this module has it.", f"module load {host.module}"]
    if cluster.partitions:
        chosen = usable_partition(cluster)
        lines += ["", "# The partitions (sinfo); * is the default one:"]
        lines += [f"#   {_partition_line(p)}" for p in cluster.partitions]
        if chosen is not None:
            lines.append(f"{'# ' if chosen.default else ''}SBATCH_PARTITION={chosen.name}")
    accounts = list(dict.fromkeys(a.account for a in cluster.associations))
    if accounts:
        lines += ["", f"# Your accounts (sacctmgr): {', '.join(accounts)}"]
        lines.append(f"{'# ' if len(accounts) == 1 else ''}SBATCH_ACCOUNT={accounts[0]}")
        qos = list(dict.fromkeys(q for a in cluster.associations for q in a.qos))
        if qos:
            lines += [f"# QOS that they allow: {', '.join(qos)}", f"# SBATCH_QOS={qos[0]}"]
    lines += [
        "",
        "# Further folders for jobs, SRC[:DST[:OPTIONS]]; scratch, recipe, data and model are always there.",
        "# AFINA_BIND=/data:/data:ro",
    ]
    return "\n".join(lines) + "\n"


def _partition_line(p: Partition) -> str:
    limit = "no time limit" if p.max_minutes is None else f"up to {minutes_in_words(p.max_minutes)}"
    kinds: dict[Nodes, int] = {}
    for kind in p.nodes:
        key = replace(kind, count=0, state="")
        kinds[key] = kinds.get(key, 0) + kind.count
    said = []
    for kind, count in kinds.items():
        memory = f", {kind.mem_mb // 1024} GB" if kind.mem_mb else ""
        gpus = f", {kind.gpus} GPUs {' '.join(kind.gpu_types)}".rstrip() if kind.gpus else ""
        said.append(f"{count} × {kind.cpus or '?'} cores{memory}{gpus}")
    return f"{p.name}{'*' if p.default else ''}: {limit}; {'; '.join(said)}{'' if p.up else ' (not up)'}"
