"""What a run says of its use of the machine, held against torch's own count, against the clock and against an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.unit.compute.encoders import CONFIGS, model_of
from torch.utils.flop_counter import FlopCounterMode

from afina.schedule import Schedule
from afina.worker.compute import flops
from afina.worker.compute.batches import epoch_steps
from afina.worker.compute.flops import DATASHEET, Peak, device_peak, flops_formula, forward_flops
from afina.worker.model.metrics import compute_metrics
from afina.worker.model.tasks import TASKS, decisions
from afina.worker.training import evaluation
from afina.worker.training.meter import PARTS, Meter, Work, share_of_peak
from afina.worker.training.results import _columns


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formulas_count_what_torch_counts(name: str) -> None:
    """The last one also within windows: torch computes, and counts, what a window hides."""
    model = model_of({**CONFIGS[name], "eos_token_id": 3, "bos_token_id": 2}).eval()
    if model.config.model_type != "mpnet":
        model.set_attn_implementation("eager")
    assert "approximation" not in flops_formula(model.config)
    for length in (2, 9, 40):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.full((1, length), 5))
        hidden = 0
        if model.config.model_type == "modernbert":
            position = torch.arange(length)
            apart = int(((position[:, None] - position).abs() > model.config.sliding_window).sum())
            local = sum(kind == "sliding_attention" for kind in model.config.layer_types)
            hidden = 4 * model.config.hidden_size * apart * local
        assert forward_flops(model.config, np.array([length]))[0] == counter.get_total_flops() - hidden


def test_an_unknown_kind_is_an_approximation_and_says_so() -> None:
    from transformers import DebertaV2Config

    config = DebertaV2Config()
    assert "approximation" in flops_formula(config)
    assert forward_flops(config, np.array([3, 10]), 1000).tolist() == [6000.0, 20000.0]


@pytest.mark.parametrize(
    ("device", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H200", "H200"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2"),
        ("Tesla V100-PCIE-16GB", "V100"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3080 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_devices_are_found_on_the_sheet_under_their_names(device: str, known: str | None) -> None:
    assert flops._on_the_sheet(device) == known


def test_the_sheet_is_consistent() -> None:
    for name, rates in DATASHEET.items():
        assert set(rates) == {"float32", "tf32", "float16", "bfloat16"}, name
        given = [rate for rate in rates.values() if rate is not None]
        assert given == sorted(given), name


def test_a_peak_is_measured_in_less_than_a_second_and_draws_no_random_numbers() -> None:
    state, began = torch.random.get_rng_state(), time.perf_counter()
    peak = device_peak(torch.device("cpu"), "float32")
    taken = time.perf_counter() - began
    assert torch.equal(state, torch.random.get_rng_state())
    assert 1e9 < peak.flops < 1e14 and "torch.mm" in peak.source
    assert taken < 3, "0.5 s on an idle core"
    side, rates = 1024, []
    left = torch.full((side, side), 0.5)
    for _ in range(12):
        wall, processor = time.perf_counter(), time.process_time()
        torch.mm(left, left)
        rates.append((2 * side**3 / (time.perf_counter() - wall), 2 * side**3 / (time.process_time() - processor)))
    # Load from elsewhere takes wall time away, from both; processor time it hardly changes.
    assert max(wall for wall, _ in rates) / 5 < peak.flops
    assert peak.flops < 2 * max(processor for _, processor in rates) * torch.get_num_threads()


def test_the_parts_add_up_and_go_on_in_the_next_attempt() -> None:
    began = time.perf_counter()
    first = Meter(launched_s=5.0)
    first.peak = Peak(1e9, "here")
    first.enter("forward_backward")
    time.sleep(0.05)
    with first.within("evaluation"):
        time.sleep(0.02)
    first.count_step(8, 100, 1e6)
    first.computed = first.real = 100
    first.enter("saving")
    said = first.summary(1)
    taken = time.perf_counter() - began
    assert set(said["seconds_by_part"]) == set(PARTS)
    assert sum(said["seconds_by_part"].values()) == pytest.approx(5 + taken, abs=0.01)
    assert said["seconds_by_part"]["evaluation"] >= 0.02
    trained = first.training_s
    assert 0.05 <= trained < 0.5
    assert said["mfu"] == pytest.approx(3e6 / (1e9 * trained), rel=1e-3)

    state = json.loads(json.dumps(first.state()))
    second = Meter(launched_s=1.0)
    second.restore(state)
    second.peak = Peak(3e9, "faster")
    second.enter("forward_backward")
    time.sleep(0.03)
    second.count_step(8, 100, 1e6)
    second.enter("saving")
    said, mine = second.summary(2), second.training_s - trained
    assert said["mfu"] == pytest.approx(6e6 / (1e9 * trained + 3e9 * mine), rel=1e-3)
    assert share_of_peak(3e9, 4e9) == 0.75 and share_of_peak(3e9, 2e9) is None and share_of_peak(0.0, 0.0) is None
    assert said["examples_per_step"] == 8
    assert said["tokens_per_second"] == pytest.approx(200 / second.training_s, rel=1e-3)
    assert 5.99 < said["seconds_by_part"]["startup"] < 6.5


def test_switching_costs_next_to_nothing() -> None:
    meter, began = Meter(), time.process_time()
    for _ in range(2000):
        for part in ("input", "forward_backward", "optimizer", "other"):
            meter.enter(part)
    assert (time.process_time() - began) / 2000 < 1e-4


@pytest.mark.parametrize("batching", ["longest", "grouped"])
@pytest.mark.parametrize("rows", [64, 67, 5])
def test_the_work_of_a_step_is_that_of_its_rows(rows: int, batching: Any) -> None:
    lengths = np.random.default_rng(3).integers(1, 90, rows)
    work = Work(lengths, lengths.astype(float) ** 2, Schedule.of(rows, 8), 11, batching)
    step = 0
    for epoch in (0, 1):
        for chosen in epoch_steps(lengths, 8, 11, epoch, batching):
            step += 1
            expected = (len(chosen), int(lengths[chosen].sum()), float((lengths[chosen].astype(float) ** 2).sum()))
            assert work(step) == expected
    assert work(1)[1] == int(lengths[epoch_steps(lengths, 8, 11, 0, batching)[0]].sum()), "backwards too"


@pytest.mark.parametrize("task", list(TASKS))
def test_scores_do_not_depend_on_blocks_or_on_where_the_logits_lie(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(4)
    count, width = 5001, 1 if task == "regression" else 5
    logits = draw.normal(size=(count, width)).astype(np.float32)
    labels = {
        "single-label": draw.integers(0, 5, count),
        "multi-label": (draw.random((count, 5)) > 0.6).astype(np.float32),
        "regression": draw.normal(size=count).astype(np.float32),
    }[task]
    from afina.recipe.metrics import METRICS

    names = list(METRICS[task])
    whole = evaluation.scores(task, names, logits, labels)
    wide = np.float64 if task == "regression" else np.int64
    reference = compute_metrics(task, names, decisions(task, logits).astype(wide), labels, width)
    assert {k: v for k, v in whole.items() if k != "loss"} == reference
    blocks = evaluation.blocks
    monkeypatch.setattr(evaluation, "_IN_MEMORY", 0)
    mapped = evaluation._allocate(logits.shape, tmp_path / "trainer")
    assert isinstance(mapped, np.memmap) and list((tmp_path / "trainer").iterdir()) == []
    mapped[:] = logits
    for size in (1, 7, 1000):
        if size == 1 and task == "multi-label":
            continue
        monkeypatch.setattr(evaluation, "blocks", lambda count, size=size: blocks(count, size))
        assert evaluation.scores(task, names, mapped, labels) == whole


def test_lists_of_labels_are_written_as_they_were_chosen() -> None:
    logits = np.array([[1, -1, 2], [-1, -1, -1], [-3, 4, -1]], np.float32)
    labels = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1]], np.float32)
    found = _columns("multi-label", ["a", "b", "c"], logits, labels)
    assert found["label"].to_pylist() == [["a"], [], ["b", "c"]]
    assert found["prediction"].to_pylist() == [["a", "c"], [], ["b"]]


# Runs


def _run(place: Path, name: str, constants: str, *options: str, **train: Any) -> Path:
    """`afina train` on 163 rows with constants of the worker's modules set otherwise."""
    (place / "scratch").mkdir(exist_ok=True)
    if not (place / "model").exists():
        tiny.tiny_model(place / "model")
        tiny.write_csv(place / "reviews.csv", tiny.tiny_reviews(203, 7))
    recipe = {
        "name": "tiny",
        "model": str(place / "model"),
        "data": {
            "files": {"all": str(place / "reviews.csv")},
            "text": "text",
            "label": "stars",
            "train": {"fraction": 0.8},
            "eval": {"fraction": 0.2},
        },
        "tokens": {"max_length": 64, "batching": train.pop("batching", "auto")},
        "train": {"batch_size": 8, "epochs": 2, "learning_rate": 0.003, "log_every": 1, **train},
    }
    (place / f"{name}.yaml").write_text(json.dumps(recipe))
    # Read at the start of every Python process of the run, and nowhere else.
    custom = place / "custom"
    custom.mkdir(exist_ok=True)
    (custom / "sitecustomize.py").write_text(
        "import sys\n"
        "class Late:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        wanted = {constants!r}\n"
        "        if name != wanted.split(':')[0]: return None\n"
        "        sys.meta_path.remove(self)\n"
        "        import importlib.util\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        run = spec.loader.exec_module\n"
        "        def execute(module): run(module); exec(wanted.split(':', 1)[1], vars(module))\n"
        "        spec.loader.exec_module = execute\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Late())\n"
    )
    environment = {
        **os.environ,
        "AFINA_SCRATCH": str(place / "scratch"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(custom),
    }
    argv = [sys.executable, "-m", "afina.cli", "train", str(place / f"{name}.yaml"), "--run", str(place / name)]
    done = subprocess.run([*argv, *options], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a place")


@pytest.mark.timeout(200)
def test_a_run_says_where_its_time_went(place: Path) -> None:
    run = _run(place, "paced", "afina.worker.training.live_progress:FIRST_S, EVERY_S = 0.1, 0.3", epochs=12)
    outcome = json.loads((run / "outcome.json").read_text())
    used = outcome["utilisation"]
    assert used["real_token_share"] == 1.0
    parts = used["seconds_by_part"]
    assert sum(parts.values()) == pytest.approx(outcome["seconds"], abs=1.0)
    assert min(parts[p] for p in ("startup", "input", "forward_backward", "optimizer", "evaluation", "saving")) > 0
    assert 0 < used["mfu"] < 1 and used["peak_flops"] > 1e9 and used["peak_memory_gb"] > 0.1
    tokens = np.load(next((place / "scratch/prepared").glob("*/train.offsets.npy")))[-1] * 12
    trained = sum(parts[p] for p in ("input", "forward_backward", "optimizer", "other"))
    assert used["tokens_per_second"] == pytest.approx(tokens / trained, rel=0.01)
    assert used["examples_per_step"] == pytest.approx(162 * 12 / outcome["global_step"], abs=1e-3)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    paces = [e for e in events if e["event"] == "pace"]
    assert len(paces) >= 2
    promised = {"step", "max_steps", "epoch", "loss", "examples_per_s", "tokens_per_s", "real_token_share", "mfu"}
    for pace in paces:
        assert promised | {"seconds_left", "memory_gb", "attempt"} <= set(pace)
        assert pace["examples_per_s"] > 0 and 0 < pace["mfu"] < 1
    assert paces[-1]["seconds_left"] < 60
    log = (run / "attempts/local-1/node0.log").read_text()
    assert log.count("tokens/s  ") == len(paces) and "real tokens/s" in log


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_padding_is_seen_and_ranks_hand_their_logits_over(place: Path) -> None:
    """Two processes that hand over after every batch, one that keeps its logits in a file: the same numbers."""
    import pyarrow.parquet as pq

    common: dict[str, Any] = {"batching": "longest", "eval_batch_size": 4}
    two = _run(place, "two", "afina.worker.training.evaluation:_HAND_OVER = 1", "--num-processes", "2", **common)
    one = _run(place, "one", "afina.worker.training.evaluation:_IN_MEMORY = 0", **common)
    outcomes = [json.loads((run / "outcome.json").read_text()) for run in (one, two)]
    for outcome in outcomes:
        assert 0.5 < outcome["utilisation"]["real_token_share"] < 1
    assert "the sum of 2 processes" in outcomes[1]["utilisation"]["peak_source"]
    tables = [pq.read_table(run / "predictions.parquet") for run in (one, two)]
    assert tables[0].schema == tables[1].schema and len(tables[0]) == len(tables[1]) == 41
    assert tables[0]["text"] == tables[1]["text"] and tables[0]["label"] == tables[1]["label"]
    for run, table, outcome in zip((one, two), tables, outcomes, strict=True):
        right = np.mean(np.array(table["label"].to_pylist()) == np.array(table["prediction"].to_pylist()))
        assert right == pytest.approx(outcome["metrics"]["eval_accuracy"]), "each row got its own logits"
        assert not (run / "trainer").exists()
