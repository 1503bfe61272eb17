"""On a GPU: packed batches equal padded ones, flash attention's dropout is dropout, and runs train, stop and resume.

    python -m pytest tests/gpu        needs one NVIDIA GPU; without one everything is skipped

`make test` does not run it: the machines that test every change have no GPU.
"""

from __future__ import annotations

import csv
import functools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.unit.compute import encoders
from tests.unit.training import test_train as runs

from afina.recipe.keys.adapter_keys import Adapter
from afina.worker.compute import attention, cuda_graphs, flash, packed_model
from afina.worker.compute.batches import PackedCollator
from afina.worker.compute.packing import pack
from afina.worker.model.adapters import add_adapter
from afina.worker.model.frozen_weights import store_frozen
from afina.worker.task.losses import Loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HALF = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
ROWS = list(range(len(encoders.LENGTHS)))


def _on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch on the GPU: tensors, the packing, and the pair of labels and weights."""
    device = torch.device("cuda")
    return {
        key: tuple(part.to(device) for part in value) if isinstance(value, tuple) else value.to(device)
        for key, value in batch.items()
    }


def _step(name: str, *, half: bool, packs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and all gradients in one vector, in float64 on the CPU; without dropout."""
    known = encoders.CONFIGS | encoders.OTHERS
    model = encoders.without_dropout(encoders.model_of(known[name])).train().cuda()
    types = "token_type_ids" in encoders.forward_arguments(model)
    # The head of a decoder finds a text's end by its padding tokens: no text may hold one.
    forbidden = encoders.PAD if name in encoders.OTHERS else None
    split = encoders.split_of(encoders.LENGTHS, 5, types=types, forbidden=forbidden)
    if packs:
        assert packed_model.why_not_packed(model) is None
        packed_model.enable_packing(model, attention.PLAIN)
    collate = packed_model.collator(model, split, "packed" if packs else "grouped", encoders.PAD, device="cuda")
    batch = _on_gpu(collate(ROWS))
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        logits, _, gradients = encoders.step(model, batch)
    return logits.double().cpu(), torch.cat([gradients[key].double().flatten().cpu() for key in sorted(gradients)])


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", [*encoders.CONFIGS, *encoders.OTHERS])
def test_packed_equals_padded(name: str) -> None:
    """In float32 to rounding; in bfloat16, with flash attention, as near to float32 as padded batches are."""
    exact = _step(name, half=False, packs=False)
    for found, expected in zip(_step(name, half=False, packs=True), exact, strict=True):
        assert _apart(found, expected) < 2e-5
    if HALF:
        padded, packs = (_step(name, half=True, packs=kind) for kind in (False, True))
        for found, usual, expected in zip(packs, padded, exact, strict=True):
            assert _apart(found, expected) < 1.5 * _apart(usual, expected) + 1e-4


@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_frozen_weights_that_were_stored_on_the_cpu_give_the_same_logits_and_gradients(dtype: str) -> None:
    """Beside an adapter: the bits are those of the CPU, and move to the GPU as they are."""
    found = []
    for device in ("cpu", "cuda"):
        model = encoders.without_dropout(encoders.model_of(encoders.OTHERS["llama"])).train()
        torch.manual_seed(0)
        add_adapter(model, Adapter(rank=4, dropout=0.0, targets="all-linear"))
        store_frozen(model, dtype)
        packed_model.enable_packing(model.to(device), attention.PLAIN)
        split = encoders.split_of(encoders.LENGTHS, 5, types=False, forbidden=encoders.PAD)
        batch = packed_model.collator(model, split, "packed", encoders.PAD, device=device)(ROWS)
        logits, _, gradients = encoders.step(model, batch if device == "cpu" else _on_gpu(batch))
        found.append((logits.double().cpu(), {name: value.double().cpu() for name, value in gradients.items()}))
    (here, of_here), (there, of_there) = found
    assert _apart(there, here) < 2e-5 and of_here.keys() == of_there.keys()
    assert all(_apart(of_there[name], value) < 2e-4 for name, value in of_here.items() if float(value.norm()))


@pytest.mark.skipif(not HALF, reason="flash attention needs compute capability 8.0")
@pytest.mark.parametrize("first_only", [False, True])
def test_dropout_of_flash_attention(first_only: bool) -> None:
    """Unbiased, reproducible by its seed, and the gradient uses the same mask: the output is linear in the values."""
    packing = pack(encoders.LENGTHS, heads=4, device="cuda").to(torch.device("cuda"))
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(sum(packing.lengths), 4, 32, device="cuda") for _ in range(4))
    if first_only:
        q, upstream = (x.index_select(0, packing.starts) for x in (q, upstream))
    q, k, v, upstream = (x.bfloat16() for x in (q, k, v, upstream))
    assert flash.supports(q)

    def out(values: torch.Tensor, p: float, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return flash.attend(q, k, values, packing, first_only, 32**-0.5, p, (None, None))

    without = out(v, 0.0, 1).float()
    assert torch.equal(out(v, 0.3, 1), out(v, 0.3, 1))
    assert not torch.equal(out(v, 0.3, 1), out(v, 0.3, 2))
    mean = torch.stack([out(v, 0.3, seed).float() for seed in range(400)]).mean(0)
    assert _apart(mean, without) < 0.1
    assert _apart(out(v, 0.3, 1).float(), without) > 0.2
    leaf = v.clone().requires_grad_()
    dropped = out(leaf, 0.3, 1)
    dropped.backward(upstream)
    assert leaf.grad is not None
    left, right = (float((a.double() * b.double()).sum()) for a, b in ((upstream, dropped.detach()), (leaf.grad, v)))
    assert left == pytest.approx(right, rel=0.02, abs=0.02 * float(upstream.double().norm()))


def _trained(
    name: str, *, dropout: bool
) -> tuple[Any, Callable[[list[int]], dict[str, Any]], Callable[..., torch.Tensor]]:
    """A model on the GPU, a collator for it, and an ordinary step in bfloat16."""
    model = encoders.model_of(encoders.CONFIGS[name])
    model = (model if dropout else encoders.without_dropout(model)).train().cuda()
    packed_model.enable_packing(model, attention.PLAIN)
    types = "token_type_ids" in encoders.forward_arguments(model)
    lengths = [60 - n % 50 for n in range(200)]
    split = encoders.split_of(lengths, 5, types=types)
    offset = packed_model.PROVEN[model.config.model_type].offset
    collate = PackedCollator(split, encoders.PAD, heads=4, offset=offset, device="cuda")

    def batch_of(rows: list[int]) -> dict[str, Any]:
        batch = collate(sorted(rows, key=lambda row: -lengths[row]))
        return _on_gpu(batch)

    def step(batch: dict[str, Any], items: torch.Tensor, half: bool = True) -> torch.Tensor:
        batch = dict(batch)
        labels, weights = batch.pop("labels")
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            logits = model(**batch)["logits"]
        loss = (Loss("single-label")(logits, labels) * weights).sum() / items
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return model, batch_of, step


#: Batches of 8 in three widths, the first and the last of the same.
BATCHES = [list(range(8)), [*range(30, 38)], [*range(100, 108)], [*range(50, 58)], [*range(8, 16)]]


@pytest.mark.skipif(not HALF, reason="flash attention needs compute capability 8.0")
@pytest.mark.parametrize(
    "name", [n for n in encoders.CONFIGS if encoders.CONFIGS[n]["model_type"] in cuda_graphs._SUPPORTED]
)
def test_a_recorded_step_is_the_step(name: str) -> None:
    """Without dropout: losses and gradients, two micro-batches of one step, and a batch that is not recorded."""
    model, batch_of, step = _trained(name, dropout=False)
    assert cuda_graphs.why_not_graphed(model, "packed", 1, bf16=True, checkpointing=False) is None
    recorded = cuda_graphs.GraphedStep(step, model, rows=8, longest=64)
    items = torch.tensor(8, device="cuda")
    for number, rows in enumerate([*BATCHES, list(range(5)), *BATCHES]):
        found = []
        for compute in (functools.partial(step, half=False), step, recorded):
            model.zero_grad(set_to_none=True)
            batches = [batch_of(chosen) for chosen in (rows, [row + 1 for row in rows])]
            losses = torch.stack([compute(batch, items) for batch in batches]).double()
            gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
            found.append((losses, torch.cat([g.flatten() for g in gradients.values()]), gradients.keys()))
        assert not recorded.fallback_reason, recorded.fallback_reason
        exact, usual, replayed = found
        assert usual[2] == replayed[2]
        for what in (0, 1):  # as near to float32 as the ordinary step in bfloat16
            assert _apart(replayed[what], exact[what]) < 1.5 * _apart(usual[what], exact[what]) + 1e-4, number
    assert len(recorded.seconds) >= 2 and recorded.padding_tokens > 0
    print(name, "recorded in", {k: round(v, 2) for k, v in recorded.seconds.items()})


@pytest.mark.skipif(not HALF, reason="flash attention needs compute capability 8.0")
def test_a_recorded_step_draws_new_masks_that_depend_on_the_seed_only() -> None:
    """When a width was recorded makes no difference, so that a run can be resumed."""
    losses = []
    for _ in range(2):
        model, batch_of, step = _trained("bert", dropout=True)
        recorded = cuda_graphs.GraphedStep(step, model, rows=8, longest=64)
        items = torch.tensor(8, device="cuda")
        for skipped in (0, 2):  # the second time all are recorded already
            torch.manual_seed(5)
            states, mine = [], []
            for rows in BATCHES:
                states.append(torch.cuda.get_rng_state())
                mine.append(float(recorded(batch_of(rows), items)))
            losses.append(mine)
            torch.cuda.set_rng_state(states[skipped])
            assert [float(recorded(batch_of(rows), items)) for rows in BATCHES[skipped:]] == mine[skipped:]
        assert not recorded.fallback_reason
        again = [float(recorded(batch_of(BATCHES[0]), items)) for _ in range(3)]
        assert len(set(again)) == 3
    assert losses[0] == losses[1] == losses[2] == losses[3]


@pytest.mark.skipif(not HALF, reason="flash attention needs compute capability 8.0")
def test_a_step_that_cannot_be_recorded_is_computed_with_a_reason() -> None:
    model, batch_of, step = _trained("bert", dropout=True)

    def waits(batch: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        float(items)  # waits for the GPU, which cannot be recorded
        return step(batch, items)

    recorded = cuda_graphs.GraphedStep(waits, model, rows=8, longest=64)
    items = torch.tensor(8, device="cuda")
    torch.manual_seed(5)
    found = [float(recorded(batch_of(rows), items)) for rows in BATCHES]
    assert recorded.fallback_reason and not recorded.seconds
    torch.manual_seed(5)
    assert found == [float(step(batch_of(rows), items)) for rows in BATCHES]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, reviews and a scratch folder."""
    place = tmp_path_factory.mktemp("on a GPU")
    tiny.write_project(place)
    return place


def _ran(process: subprocess.Popen[str], code: int = 0) -> None:
    """The command ends with `code`. A process of its own: a fork of one that has asked for a GPU cannot use it."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output


def _train(place: Path, name: str, recipe: dict[str, Any]) -> Path:
    _ran(runs._start(place, place / name, recipe))
    return place / name


def _resume(place: Path, run: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "afina", "resume", str(run)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(argv, env=runs._environment(place), text=True, **pipes)


def test_a_run_trains_on_the_gpu_logs_it_and_predicts(place: Path) -> None:
    run = _train(place, "whole", runs._recipe(train={"epochs": 8, "cuda_graphs": True}))
    outcome = runs._outcome(run)
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    precision = next(event for event in events if event["event"] == "precision")
    assert (precision["device"]["kind"], precision["precision"]) == ("cuda", "bf16" if HALF else "fp16")
    assert outcome["metrics"]["eval_accuracy"] > 0.4
    used = outcome["utilisation"]
    log = (run / "attempts/local-1/node0.log").read_text()
    assert ("are recorded as CUDA graphs, one for each width" in log) == HALF, log
    assert 0.3 < used["real_token_share"] <= 1.0 and used["tokens_per_second"] > 0 and 0 < used["peak_memory_gb"] < 5
    texts = place / "new.csv"
    tiny.write_csv(texts, tiny.tiny_reviews(60, 9))
    predicted: dict[str, list[dict[str, str]]] = {}
    for device, environment in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        out = place / f"{device}.csv"
        argv = [sys.executable, "-m", "afina", "predict", str(run), str(texts), "-o", str(out)]
        done = subprocess.run(
            argv, env={**runs._environment(place), **environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        with out.open(newline="") as file:
            predicted[device] = list(csv.DictReader(file))
    assert len(predicted["gpu"]) == len(predicted["cpu"]) == 60
    scores = [key for key in predicted["cpu"][0] if key.startswith("score")]
    assert len(scores) == 5
    for a, b in zip(predicted["gpu"], predicted["cpu"], strict=True):
        for key in scores:
            assert float(a[key]) == pytest.approx(float(b[key]), abs=1e-3)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_run_stopped_and_killed_on_the_gpu_is_nearly_the_undisturbed_run(place: Path, recorded: bool) -> None:
    """Batches, dropout, schedule and optimizer resume exactly; a GPU sums gradients in varying order."""
    recipe = runs._recipe(train={"epochs": 8, "save_every": 5, "cuda_graphs": recorded})
    whole = _train(place, f"undisturbed-{recorded}", recipe)
    run = place / f"disturbed-{recorded}"
    process = runs._start(place, run, recipe)
    runs._wait_for_lines(run, 6)
    process.send_signal(signal.SIGTERM)
    _ran(process, 75)
    resumed = _resume(place, run)
    runs._wait_for_lines(run, 40, attempt=2)
    subprocess.run(["pkill", "-KILL", "-f", f"afina.worker train {run}"], check=True)
    _ran(resumed, 4)
    _ran(_resume(place, run))
    expected, found = runs._lines(whole), runs._lines(run)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    losses = [(a["loss"], b["loss"]) for a, b in zip(expected, found, strict=True) if "loss" in a]
    apart = max(abs(a - b) / a for a, b in losses[: len(losses) // 2])
    print(f"losses {apart:.1e} apart in the first half; the same bytes: {expected == found}")
    assert apart < 0.05


def test_a_rehearsal_measures_the_memory_of_the_gpu(place: Path) -> None:
    file = place / "rehearsed.yaml"
    file.write_text(json.dumps(runs._recipe()))
    argv = [sys.executable, "-m", "afina", "rehearse", str(file), "--json"]
    done = subprocess.run(argv, env=runs._environment(place), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cuda" in done.stdout, done.stdout


def test_doctor_names_the_gpu(place: Path) -> None:
    argv = [sys.executable, "-m", "afina.worker", "doctor"]
    done = subprocess.run(argv, env=runs._environment(place), capture_output=True, text=True, check=False)
    assert torch.cuda.get_device_name() in done.stdout, done.stdout + done.stderr
