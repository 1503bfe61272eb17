"""The forecast: its evidence, its sizes, and the time and memory to request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from afina.forecast.duration import fit_line
from afina.forecast.estimate import describe, estimate
from afina.forecast.measurements import Earlier, Measured, Workload
from afina.recipe.schema import Recipe
from afina.run.job_request import JobRequest
from afina.run.plan import Plan, make_plan
from afina.site.settings import Site
from afina.sizes import Sizes

P = 108_310_272
BERT = Workload(
    rows={"train": 8000, "eval": 1000}, tokens={"train": 400_000, "eval": 50_000}, sizes=Sizes(4 * P, 16 * P, 12 * P, 4 * P)
)  # fmt: skip
MEASURED = Measured(
    device="cpu", device_name="a processor", threads=2, batching="packed", parameters=108_310_272,
    costs=(1000, 2000, 1500), seconds=(1.1, 2.1, 1.6), mean_cost=1200, longest_tokens=4096, train_rows=8000,
    eval_cost=100_000, eval_seconds_per_cost=0.0004, save_seconds=2.0, stall_seconds=0.5, checkpoint_bytes=1_300_000_000,
    startup_seconds=12.0, base_bytes=500_000_000, peak_bytes=5_000_000_000,
)  # fmt: skip
EARLIER = Earlier(
    "run-1", "cpu", tokens_per_second=500.0, startup_seconds=15.0, other_seconds=100.0, evaluated_tokens=25_000
)


@pytest.fixture
def plan(recipe: Callable[..., Recipe], site: Site) -> Callable[..., Plan]:
    def make(nodes: int = 1, gpus: int = 0, **changes: Any) -> Plan:
        return make_plan(
            recipe(**{"train__epochs": 3, "train__batch_size": 16, "data__files": {"all": "reviews.csv"}, **changes}),
            site,
            JobRequest(nodes=nodes, gpus_per_node=gpus),
        )

    return make


@pytest.fixture(autouse=True)
def _data_is_here(hostile: None) -> None:
    from pathlib import Path

    Path("reviews.csv").write_text("text,stars\ngood,5\n")


def test_shards_divide_weights_gradients_and_optimizer_state_but_not_the_start(plan: Callable[..., Plan]) -> None:
    """Of the memory of a rehearsal's one process, which held all of them."""
    sharded = plan(nodes=2, gpus=2, train__sharding="fsdp")
    assert estimate(sharded, BERT).state_gb == round(4 * P / 1e9, 6)
    measured = MEASURED.model_copy(update={"device": "cuda", "gpu_peak_bytes": 9_000_000_000})
    found, whole = (estimate(each, BERT, measured=measured) for each in (sharded, plan(nodes=2, gpus=2)))
    assert found.gpu_gb == pytest.approx((whole.gpu_gb or 0) - 12 * P / 1e9, abs=0.01)
    assert found.host_gb == pytest.approx(2 * (5.0 - 9 * P / 1e9) + 0.25, abs=0.01)
    assert any("computed from that of one process" in note for note in found.notes)
    large = estimate(
        sharded, replace(BERT, sizes=Sizes(*(n * 7_000_000_000 for n in (4, 16, 12, 4)))), measured=measured
    )
    assert (large.host_gb or 0) > 2 * 28, "each process reads all weights at the start"


def test_without_evidence_the_model_state_is_exact_and_time_and_memory_are_unknown(plan: Callable[..., Plan]) -> None:
    """Of the model's sizes: two checkpoints, the best, the one that is written, and the model in `model/`."""
    found = estimate(plan(), BERT)
    assert (found.basis, found.seconds, found.attempts, found.time_min) == ("model", None, None, None)
    assert (found.host_gb, found.gpu_gb, found.mem_gb) == (None, None, None)
    assert found.total_steps == 1500 and found.checkpoint_gb == round(12 * P / 1e9, 6)
    assert found.state_gb == round(16 * P / 1e9, 6) and found.disk_gb == round((4 * 12 + 4) * P / 1e9, 6)
    assert estimate(plan(train__keep="last"), BERT).disk_gb == round((3 * 12 + 4) * P / 1e9, 6)
    text = "\n".join(describe(found.to_json()))
    assert "forecast: 1,500 steps, time unknown; memory unknown, 1.7 GB of it weights" in text
    assert "afina rehearse RECIPE" in text and "enough" not in text
    pickled = estimate(plan(), replace(BERT, sizes=None))
    assert (pickled.checkpoint_gb, pickled.disk_gb, pickled.state_gb) == (None, None, None)
    assert "a checkpoint" not in "\n".join(describe(pickled.to_json()))


@pytest.mark.parametrize("precision", ["auto", "fp32", "tf32", "bf16", "fp16"])
def test_no_size_depends_on_the_precision(plan: Callable[..., Plan], precision: str) -> None:
    """Products may be in 16 bits; weights, gradients, moments and checkpoints stay in float32."""
    chosen, default = (plan(gpus=1, train__precision=p) for p in (precision, "auto"))
    assert estimate(chosen, BERT).to_json() == estimate(default, BERT).to_json()


def test_a_forecast_of_an_earlier_afina_is_described(plan: Callable[..., Plan]) -> None:
    values = estimate(plan(), BERT, measured=MEASURED).to_json()
    del values["state_gb"]
    assert "memory 6.9 GB per node" in describe({**values, "measured": {}})[0]


def test_the_line_of_step_times_is_not_moved_by_a_few_slow_steps() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    costs = [rng.uniform(500, 4000) for _ in range(15)]
    seconds = [0.2 + 0.001 * c for c in costs]
    assert fit_line(costs, seconds) == (pytest.approx(0.2), pytest.approx(0.001))
    for number in rng.sample(range(15), 3):
        seconds[number] += 30
    fixed, slope = fit_line(costs, seconds)
    assert fixed + slope * 2000 == pytest.approx(2.2, rel=0.15)


@pytest.mark.parametrize(
    ("costs", "seconds", "at_1000"),
    [([1000], [2.0], 2.0), ([1000, 1000], [2.0, 2.2], 2.1), ([500, 1000], [3.0, 1.0], 2.0), ([500, 1000], [0.1, 9.0], 6.975)],
)  # fmt: skip
def test_the_line_is_never_negative_nor_steeper_than_through_the_origin(
    costs: list[float], seconds: list[float], at_1000: float
) -> None:
    fixed, slope = fit_line(costs, seconds)
    assert fixed >= 0 and slope >= 0
    assert fixed + slope * 1000 == pytest.approx(at_1000, rel=0.35)


def test_a_rehearsal_becomes_the_time_of_the_run(plan: Callable[..., Plan]) -> None:
    found = estimate(plan(), replace(BERT, simple_models=True), measured=MEASURED, limit_min=24 * 60)
    assert found.basis == "rehearsal" and found.total_steps == 1500
    parts = found.seconds_by_part
    assert parts["startup"] == 12.0
    assert parts["steps"] == pytest.approx(1500 * (0.1 + 0.001 * 1200), rel=0.01)
    # Three epochs, and once more where the best one is not the last.
    assert parts["evaluations"] == pytest.approx(4 * 40.0, rel=0.01)
    assert parts["simple_models"] == 68.0, "beside a training of half an hour texts are embedded for a minute at most"
    without = estimate(plan(), BERT, measured=MEASURED)
    assert without.seconds_by_part["simple_models"] == 0.0
    assert found.seconds == pytest.approx(sum(parts.values()), abs=0.2)
    # Of the 5 GB in the rehearsal 0.5 were libraries, 16 P state and 12 P its copy: the rest is needed again. At the end the best weights.
    assert without.host_gb == pytest.approx(5.0 + (4.5 - 28 * P / 1e9) + 4 * P / 1e9) and without.checkpoint_gb == 1.3
    # 0.75 GB and the weights in the process of the simple models; a fifth more, in Slurm's G.
    assert found.host_gb == pytest.approx(10.25 - 20 * P / 1e9)
    assert found.mem_gb == math.ceil(1.2 * (10.25e9 - 20 * P) / 2**30) == 10
    assert found.time_min is not None and found.time_min * 60 > 1.2 * (found.seconds or 0)
    assert found.attempts == 1


def test_a_short_limit_means_more_attempts(plan: Callable[..., Plan]) -> None:
    found = estimate(plan(resources__time=15), BERT, measured=MEASURED, limit_min=15)
    # Of its 900 s an attempt trains 900 - 12 (start) - 15 - 2 × 2 (saves) - 3 × 2.1 (steps) = 862.7, not less for every save of the run.
    work = 1500 * 1.3 + 4 * 40 + 4 * 0.5 + 2
    assert (found.seconds or 0) == pytest.approx(12 + work, abs=0.1)
    assert found.time_min == 15 and found.attempts == math.ceil(work / 862.7) == 3
    often = estimate(plan(resources__time=15, train__save_every=5), BERT, measured=MEASURED, limit_min=15)
    assert often.attempts == 3, "300 saves stall the training for 150 s"
    none = estimate(plan(resources__time=1), BERT, measured=MEASURED.model_copy(update={"startup_seconds": 90.0}))
    assert none.attempts is None and "too short" in "\n".join(describe(none.to_json()))


def test_several_processes_share_the_work_and_each_has_its_memory(plan: Callable[..., Plan]) -> None:
    one, two = (estimate(plan(nodes=1), BERT, measured=MEASURED), estimate(plan(nodes=2), BERT, measured=MEASURED))
    assert two.host_gb == pytest.approx((one.host_gb or 0) + 0.25), "per node, with a launcher"
    assert two.seconds_by_part["evaluations"] == pytest.approx(one.seconds_by_part["evaluations"] / 2)
    assert any("communication" in note for note in two.notes) and not one.notes


def test_a_rehearsal_on_a_cpu_tells_nothing_about_a_gpu(plan: Callable[..., Plan]) -> None:
    found = estimate(plan(gpus=1), BERT, measured=MEASURED)
    assert (found.device, found.basis, found.seconds, found.time_min) == ("cuda", "model", None, None)
    assert (found.host_gb, found.gpu_gb, found.mem_gb) == (None, None, None)
    assert "srun --gpus=1" in found.notes[0]
    assert "time unknown; memory unknown" in "\n".join(describe(found.to_json()))


def test_memory_of_a_gpu_is_that_of_a_rehearsal_or_of_earlier_runs_on_one(plan: Callable[..., Plan]) -> None:
    on_gpu = MEASURED.model_copy(update={"device": "cuda", "gpu_peak_bytes": 7_000_000_000})
    assert estimate(plan(gpus=1), BERT, measured=on_gpu).gpu_gb == 8.0, "and a gigabyte for CUDA itself"
    earlier = estimate(plan(gpus=1), BERT, earlier=[replace(EARLIER, device="cuda", peak_gb=7.0)])
    assert (earlier.host_gb, earlier.gpu_gb, earlier.mem_gb) == (None, 8.0, None)
    assert "memory unknown, 8.0 GB of each GPU" in describe(earlier.to_json())[0]


def test_earlier_runs_tell_the_time_of_the_next(plan: Callable[..., Plan]) -> None:
    other = replace(EARLIER, device="cuda", tokens_per_second=1e6)
    found = estimate(plan(), BERT, earlier=[other, EARLIER])
    assert found.basis == "earlier runs"
    assert found.seconds_by_part == {
        "startup": 15.0,
        "steps": 2400.0,
        "evaluations": 800.0,
        "saves": 0.0,
        "simple_models": 0.0,
    }
    longer = estimate(plan(), replace(BERT, tokens={"train": 800_000, "eval": 50_000}), earlier=[EARLIER])
    assert longer.seconds_by_part["steps"] == 4800.0, "texts of other data have other lengths"
    beside = replace(BERT, simple_models=True)
    runs = [EARLIER, replace(EARLIER, simple_seconds=20.0)]
    assert estimate(plan(), beside, earlier=runs).seconds_by_part["simple_models"] == 20.0, "the first one had none"
    assert estimate(plan(), beside, earlier=[EARLIER]).seconds_by_part["simple_models"] == 68.0
    assert estimate(plan(), BERT, earlier=[replace(EARLIER, peak_gb=3.5)]).host_gb == 3.5
    # A rehearsal knows better.
    assert estimate(plan(), BERT, measured=MEASURED, earlier=[EARLIER]).basis == "rehearsal"


def test_sizes_are_printed_in_the_unit_that_fits(plan: Callable[..., Plan]) -> None:
    lora = estimate(plan(), replace(BERT, sizes=Sizes(90_000_000, 94_000_000, 1_230_000, 410_000)))
    assert "94.0 MB of it weights" in describe(lora.to_json())[0]
    assert "a checkpoint 1.2 MB, the run directory up to 5.3 MB" in describe(lora.to_json())[0]


def test_too_little_memory_is_a_warning(plan: Callable[..., Plan]) -> None:
    assert "warning: 4 GB are requested" in "\n".join(describe(estimate(plan(resources__mem_gb=4), BERT, measured=MEASURED).to_json()))  # fmt: skip
    assert "warning" not in "\n".join(describe(estimate(plan(resources__mem_gb=7), BERT, measured=MEASURED).to_json()))


@pytest.mark.parametrize(("minutes", "words"), [(0.5, "30 s"), (3, "3 min"), (150, "2 h 30 min"), (4320, "3 days")])
def test_times_in_words(plan: Callable[..., Plan], minutes: float, words: str) -> None:
    values = {**estimate(plan(), BERT, measured=MEASURED).to_json(), "seconds": minutes * 60}
    assert f"about {words}; memory" in describe(values)[0]
