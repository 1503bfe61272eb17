"""The recipe that `afina init` proposes, as YAML with the reasons as comments. Pure.

The rules are common practice, not laws:

    max_length   the least multiple of 16 that holds 99 % of the texts whole, within the model's positions
    truncation   head+tail where 5 % of the texts are longer, else head
    windows      in its place where 25 % are longer: as many as 99 % of the texts need, 8 at most
    metrics      macro F1 first where the largest class has three times the rows of the smallest
    epochs       5 below 1,000 rows, 3 below 50,000, 2 below 500,000, else 1
    batch_size   8 below 500 rows, 16 below 20,000, else 32
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from afina.formats.read_options import PLAIN, ReadOptions
from afina.recipe.metrics import selection_metric
from afina.start.examine import Examined, quantile
from afina.start.find_model import ModelFacts
from afina.text import minutes_in_words, plural

__all__ = ["DEFAULT_MODEL", "MULTILINGUAL_MODEL", "Proposal", "data_warnings", "recipe_text"]

DEFAULT_MODEL = "google-bert/bert-base-cased"
MULTILINGUAL_MODEL = "FacebookAI/xlm-roberta-base"
#: Tokens per word or punctuation mark. Measured: 1.03 to 1.10 for English reviews and BERT's uncased vocabulary; others take more.
_TOKENS_PER_WORD = 1.25
_SPECIAL_TOKENS = 2
_UNEVEN = 3.0
_RARE = 10
#: The shares of texts longer than `max_length` above which both their ends are kept, and above which they are read as windows.
_MANY_LONG, _MOST_LONG = 0.05, 0.25
_STRIDE, _MOST_WINDOWS = 128, 8
#: Floating-point operations per second for a first guess of the time; `afina rehearse` measures.
_CPU_RATE, _GPU_RATE = 25e9, 15e12
_START_MIN = 10
_EVAL_SHARE = 0.1
_SEED = 42
_SPLITS = ("train", "eval", "test")


@dataclass(frozen=True)
class Proposal:
    """Choices and findings from which the recipe is written.

    Attributes:
        files: split -> paths as the recipe writes them; empty for a Hub data set.
        splits: split -> the Hub's split or the file key it is read from; empty for one source.
        examined: the training split, or the one source.
        others: the other splits.
        split_column: names the split of each row; group: what several texts come from; weight: looks like the weight of each row;
            other_labels: look like the label too.
        node_mem_gb, limit_min: of the partition, where it has such limits.
    """

    name: str
    model: ModelFacts
    text: tuple[str, ...]
    label: tuple[str, ...]
    examined: Examined
    files: Mapping[str, tuple[str, ...]]
    hub: str | None = None
    config: str | None = None
    splits: Mapping[str, str] | None = None
    id: str | None = None
    reading: ReadOptions = PLAIN
    guessed: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Examined] = field(default_factory=dict)
    split_column: str | None = None
    group: str | None = None
    weight: str | None = None
    other_labels: tuple[str, ...] = ()
    gpus: int = 0
    cpus: int = 4
    node_mem_gb: int | None = None
    limit_min: int | None = None

    @property
    def regression(self) -> bool:
        return self.examined.numeric and not self.examined.whole_numbers

    @property
    def train_rows(self) -> int:
        splits = self.split_rows if self.split_column else self.splits or {}
        share = 1.0 if "eval" in splits else 1 - _EVAL_SHARE if "test" in splits else 0.8
        rows = self.split_rows.get("train", 0) if self.split_column else self.examined.rows
        return math.floor(rows * share)

    @property
    def split_rows(self) -> dict[str, int]:
        """Rows by split, as `split_column` names them."""
        return {split: rows for split, rows in self.examined.split_rows.items() if split is not None}

    @property
    def epochs(self) -> int:
        rows = self.train_rows
        return 5 if rows < 1000 else 3 if rows < 50_000 else 2 if rows < 500_000 else 1

    @property
    def batch_size(self) -> int:
        rows = self.train_rows
        return 8 if rows < 500 else 16 if rows < 20_000 else 32

    @property
    def tokens(self) -> list[int]:
        """Tokens of each text that was read, ascending."""
        factor = self.model.tokens_per_word or _TOKENS_PER_WORD
        special = _SPECIAL_TOKENS + (len(self.text) - 1)
        return [math.ceil(n * factor) + special for n in self.examined.words]


def recipe_text(p: Proposal) -> str:
    """The recipe; doubts about the data are comments."""
    tokens = p.tokens
    most = 1.0 if p.examined.tagged else 0.99  # entities behind the end are missed
    length = min(max(16, math.ceil(quantile(tokens, most) / 16) * 16), p.model.positions)
    windows, cut, about_long = _long_texts(p, tokens, length)
    known = f"{p.model.parameters / 1e6:.0f} million parameters, {p.model.positions} positions" if p.model.known else ""
    lines = [
        "# Proposed by `afina init` from the data; change what you know better. Keys: afina recipe keys",
        f"name: {_yaml(p.name)}",
        *_comments([known] if known else []),
        f"model: {_yaml(p.model.id)}",
        *(["adapter: {}            # the one in this folder is trained on"] if p.model.adapter else []),
        *(["task: token-classification"] if p.examined.tagged else []),
        *_data(p),
        *_comments([*_about_length(p, tokens, length, windows), *about_long]),
        f"tokens: {{max_length: {length}{cut}}}",
        *_train(p, windows),
        *_resources(p, tokens, length * windows),
    ]
    return "\n".join(lines) + "\n"


def data_warnings(p: Proposal) -> list[str]:
    """Problems of the data to solve before anything is run; the recipe has them as comments."""
    warnings = []
    for split, x in {"": p.examined, **p.others}.items():
        where = f"{split}: " if split else ""
        warnings += [f"{where}{line}" for line in x.odd]
        for what, rows in x.refused.items():
            have = "row has" if rows.count == 1 else "rows have"
            warnings.append(
                f"{where}{rows.count:,} {have} {what} ({_row_numbers(rows.first)}): afina prefetch refuses that; correct or "
                "remove them"
            )
    x = p.examined
    if p.other_labels:
        others = " or ".join(map(_code, p.other_labels[:8]))
        warnings.append(
            f"`{p.label[0]}` is taken as the label, a guess by its values; if it is {others}: `label:` here, or --label"
        )
    if x.flags:
        warnings.append(
            f"`{p.label[0]}` holds 0 and 1, as {', '.join(map(_code, x.flags[:8]))} {'does' if len(x.flags) == 1 else 'do'}: for several "
            f"labels a row `label: {_flow([*p.label, *x.flags[:8]])}`"
        )
    if x.complete and len(x.labels) == 1 and not x.multiple and not x.tagged:
        warnings.append(
            f"every row has the label {_short(next(iter(x.labels)))}: afina prefetch refuses that; is it the label column?"
        )
    if len(p.label) == 1 and x.multiple and x.labels and set(x.labels) <= {"0", "1", "0.0", "1.0", "false", "true"}:
        warnings.append(
            f"`{p.label[0]}` holds lists of 0 and 1: afina prefetch refuses that; write the names of the labels, or one 0/1 column for each"
        )
    if shared := sum(len(p.examined.digests & other.digests) for other in p.others.values()):
        are = "text of the other splits is" if shared == 1 else "texts of the other splits are"
        warnings.append(f"{shared:,} {are} in train too: the scores will be too good")
    return warnings


# -- sections ----------------------------------------------------------------------------------------------------------


def _comments(reasons: Iterable[str], indent: str = "") -> list[str]:
    return [f"{indent}# {' '.join(reason.split())}" for reason in reasons]


def _data(p: Proposal) -> list[str]:
    x = p.examined
    about = [
        f"{'' if x.complete else 'about '}{plural(x.rows, 'row')}; a text has {x.characters:.0f} characters on average"
    ]
    about += [f"WARNING: {warning}" for warning in data_warnings(p)]
    if x.duplicates:
        are = "text occurs" if x.duplicates == 1 else "texts occur"
        about.append(f"{x.duplicates:,} {are} more than once: after a split the same text may be trained on and tested")
    lines = [*_comments(about), "data:"]
    if p.hub:
        lines.append(f"  hub: {_yaml(p.hub)}")
        lines += [f"  config: {_yaml(p.config)}"] if p.config else []
    else:
        files = ", ".join(f"{split}: {_flow(paths)}" for split, paths in p.files.items())
        lines.append(f"  files: {{{files}}}")
        for key, value in p.reading.given().items():
            reason = f"            # {p.guessed[key]}" if key in p.guessed else ""
            lines.append(f"  {key}: {_option(value)}{reason}")
    lines += [f"  text: {_flow(p.text)}", *_comments(_about_labels(p), "  "), f"  label: {_flow(p.label)}"]
    lines += [f"  label_separator: {_yaml(x.separator)}"] if x.separator is not None else []
    lines += [f"  split_column: {_yaml(p.split_column)}"] if p.split_column else []
    lines += [f"  id: {_yaml(p.id)}            # copied into the predictions"] if p.id else []
    lines += (
        [f"  group: {_yaml(p.group)}         # rows of one value stay in one part: scores hold for new ones"]
        if p.group
        else []
    )
    if p.weight:
        lines.append(f"  # `{p.weight}` is not used; if it holds the weight of each row: `weight: {_yaml(p.weight)}`")
    return [*lines, *_splits(p)]


def _about_labels(p: Proposal) -> list[str]:
    if p.regression:
        return ["numbers, some of them not whole: a regression"]
    labels = p.examined.labels
    if not labels:
        return []
    shown = ", ".join(f"{_short(name)} {count:,}" for name, count in list(labels.items())[:8])
    if p.examined.tagged:
        return [
            f"{plural(len(labels), 'type')} of entities: {shown}{f', … {len(labels) - 8} more' if len(labels) > 8 else ''}"
        ]
    about = [f"{plural(len(labels), 'label')}: {shown}{f', … {len(labels) - 8} more' if len(labels) > 8 else ''}"]
    rare = sum(count < _RARE for count in labels.values())
    if rare:
        about.append(f"{rare} of them have fewer than {_RARE} rows: too few to learn or to measure")
    if len(labels) > 200:
        about.append("WARNING: so many labels are unusual: is this the label column?")
    if p.examined.numeric:
        about.append("whole numbers are taken as classes; with `task: regression` their order counts")
    return about


def _splits(p: Proposal) -> list[str]:
    """Where each split comes from, and why."""
    splits = dict.fromkeys(p.split_rows, "train") if p.split_column else dict(p.splits or {})
    if p.split_column and "eval" in splits:
        shown = ", ".join(f"{split} {p.split_rows[split]:,}" for split in _SPLITS if split in splits)
        why = f"the column `{p.split_column}` names the split of each row: {shown}"
        specs = {split: "{}" for split in _SPLITS if split in splits}
    elif "eval" in splits:
        why = f"the data come in splits: {', '.join(splits)}"
        specs = {split: _split(split, source) for split, source in splits.items()}
    elif "test" in splits:
        why = "there is a test split and no eval split: a tenth of train is kept for it"
        source = _yaml(splits["train"])
        shares = {"train": 1 - _EVAL_SHARE, "eval": _EVAL_SHARE}
        specs = {split: f"{{split: {source}, fraction: {share}, seed: {_SEED}}}" for split, share in shares.items()}
        specs["test"] = "{}" if p.split_column else _split("test", splits["test"])
    else:
        why = "one source: a row's split follows from its text and the seed, and stays when rows are added"
        why = f"one source: whole groups of `{p.group}` are divided, with the seed" if p.group else why
        large = p.examined.rows >= 5000
        shares = {"train": 0.8, "eval": 0.1, "test": 0.1} if large else {"train": 0.8, "eval": 0.2}
        specs = {split: f"{{fraction: {share}, seed: {_SEED}}}" for split, share in shares.items()}
    return [*_comments([why], "  "), *(f"  {split}: {spec}" for split, spec in specs.items())]


def _split(split: str, source: str) -> str:
    return "{}" if source == split else f"{{split: {_yaml(source)}}}"


def _long_texts(p: Proposal, tokens: Sequence[int], length: int) -> tuple[int, str, list[str]]:
    """Windows of a text at most, the keys that say how longer texts are read, and why. Of pairs the longer text is cut, and words with tags are not read so."""
    longer = 0.0 if len(p.text) == 2 or p.examined.tagged else sum(n > length for n in tokens) / max(1, len(tokens))
    if longer > _MOST_LONG and length >= 2 * _STRIDE:
        more = (quantile(tokens, 0.99) - length) / (length - _SPECIAL_TOKENS - _STRIDE)
        windows = min(1 + math.ceil(more), _MOST_WINDOWS)
        why = "windows read all of such a text, at the cost of all its tokens; `truncation: head+tail` in their place keeps its two ends"
        return windows, f", windows: {{stride: {_STRIDE}, max_windows: {windows}}}", [why]
    if longer > _MANY_LONG:
        stride = "" if length >= 2 * _STRIDE else f"stride: {length // 4}"
        why = (
            f"head+tail keeps a quarter of the tokens from the beginning of such a text and the rest from its end; `windows: {{{stride}}}` "
            "in its place reads all of it, at the cost of all its tokens"
        )
        return 1, ", truncation: head+tail", [why]
    return 1, "", []


def _about_length(p: Proposal, tokens: Sequence[int], length: int, windows: int) -> list[str]:
    measured = p.model.tokens_per_word is not None
    how = "by the model's tokenizer" if measured else f"estimated, {_TOKENS_PER_WORD} per word or punctuation mark"
    half, most, longest = quantile(tokens, 0.5), quantile(tokens, 0.99), tokens[-1] if tokens else 0
    about = [f"tokens per text ({how}): half have up to {half}, 99 % up to {most}, the longest {longest}"]
    longer = sum(n > length for n in tokens) / max(1, len(tokens))
    if windows > 1:
        about.append(f"{longer:.1%} of the texts are longer than a window of {length}")
    elif longer:
        limit = f", and the model has {p.model.positions} positions" if length == p.model.positions else ""
        about.append(
            f"{longer:.1%} of the texts will be cut at {length}{limit}; padding is not computed, so a larger number costs "
            "nothing for the others"
        )
    return about


def _train(p: Proposal, windows: int) -> list[str]:
    per_epoch = math.ceil(p.train_rows / p.batch_size)
    rate = 3e-5 if p.model.parameters > 60e6 else 5e-5
    metrics, why = _metrics(p)
    best = selection_metric("regression") if p.regression else metrics[0]
    about = f"{p.train_rows:,} training rows: {plural(p.epochs, 'epoch')} of {per_epoch:,} steps, {per_epoch * p.epochs:,} in all"
    save = ["  # an epoch is long: a killed job repeats 500 steps at most", "  save_every: 500"]
    return [
        *_comments([about]),
        "train:",
        f"  batch_size: {p.batch_size}            # global: examples per optimizer step, on one GPU or on eight",
        *([f"  max_batch_per_device: {max(1, p.batch_size // windows)}  # texts at once"] if windows > 1 else []),
        f"  epochs: {p.epochs}",
        f"  learning_rate: {rate:.1e}".replace("e-0", "e-"),
        *(save if per_epoch > 500 else []),
        f"  best_metric: {best}",
        "  arguments: {warmup_steps: 0.06, weight_decay: 0.01}",
        *_comments([why]),
        f"metrics: [{', '.join(metrics)}]",
    ]


def _metrics(p: Proposal) -> tuple[list[str], str]:
    """Metrics, the one that selects the best checkpoint first, and why."""
    if p.regression:
        return ["mse", "mae", "pearson"], "of a regression"
    if p.examined.tagged:
        return ["f1", "precision", "recall"], "of whole entities, all counted alike"
    counts = sorted(p.examined.labels.values())
    if p.examined.multiple or p.examined.separator is not None:
        return (
            ["f1", "f1_micro", "subset_accuracy"],
            "several labels per row: F1, averaged over the labels and over all decisions",
        )
    if counts and counts[-1] >= _UNEVEN * counts[0]:
        return (
            ["f1", "accuracy", "confusion_matrix"],
            f"the largest class has {counts[-1] / counts[0]:.1f} times the rows of the smallest ({counts[-1] / sum(counts):.0%} "
            "of all): macro F1 counts each class alike",
        )
    return ["accuracy", "f1", "confusion_matrix"], "the classes are of similar size, so accuracy is meaningful"


def _resources(p: Proposal, tokens: Sequence[int], length: int) -> list[str]:
    mean_tokens = sum(min(n, length) for n in tokens) / max(1, len(tokens))
    flops = 6 * p.model.parameters * mean_tokens * p.train_rows * p.epochs
    minutes = _START_MIN + 2 * flops / (_GPU_RATE * p.gpus if p.gpus else _CPU_RATE * p.cpus) / 60
    unit = 10 if minutes <= 60 else 30 if minutes <= 480 else 60
    minutes = math.ceil(minutes / unit) * unit
    device = f"{p.gpus} GPU" if p.gpus else plural(p.cpus, "core")
    why = f"time and memory are guesses, from {flops:.1e} floating-point operations on {device}; `afina rehearse` measures them"
    if p.limit_min is not None and minutes > p.limit_min:
        why += f"; the partition allows {minutes_in_words(p.limit_min)}, and the run continues in further jobs"
        minutes = p.limit_min
    time = f"{minutes // 60}:{minutes % 60:02d}:00"
    resources = f"nodes: 1, gpus_per_node: {p.gpus}, cpus_per_gpu: {p.cpus}, mem_gb: {_memory_gb(p)}, time: {time}"
    return [*_comments([why]), f"resources: {{{resources}}}"]


def _memory_gb(p: Proposal) -> int:
    """GB per node: libraries, and one and a half times weights, gradients, optimizer state and a copy of a save; at least 4."""
    state = 28.0 * p.model.parameters
    wanted = max(4, math.ceil((1e9 + (1e9 if p.gpus else 0.0) + 1.5 * state) / 1e9))
    return min(wanted, p.node_mem_gb) if p.node_mem_gb else wanted


def _row_numbers(rows: Sequence[int]) -> str:
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}{', …' if len(rows) == 5 else ''}"


def _code(name: str) -> str:
    return f"`{name}`"


def _short(name: str) -> str:
    shown = " ".join(name.split())
    return repr(shown if len(shown) <= 24 else shown[:23] + "…")


def _option(value: str | bool | list[str]) -> str:
    return json.dumps(value) if isinstance(value, bool) else _flow(value) if isinstance(value, list) else _yaml(value)


def _flow(values: Sequence[str]) -> str:
    return _yaml(values[0]) if len(values) == 1 else f"[{', '.join(map(_yaml, values))}]"


def _yaml(text: str) -> str:
    """A YAML scalar: plain where it cannot be mistaken for another type, else in JSON's quotes, which YAML 1.2 reads."""
    if re.fullmatch(r"[A-Za-z_./][\w./@+-]*( [\w./@+-]+)*", text, re.ASCII) and text.lower() not in _YAML_WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)


_YAML_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n", ".nan", ".inf", ".")
