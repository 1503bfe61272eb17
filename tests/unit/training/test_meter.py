"""The meter: where a run's time goes and how much of the machine its tokens use, against the clock and over attempts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.unit.training.in_process import train_here

from afina.schedule import Schedule
from afina.worker.compute.batches import epoch_steps
from afina.worker.compute.flops import Peak
from afina.worker.training.meter import PARTS, Meter, Work, share_of_peak


def test_the_parts_add_up_over_attempts() -> None:
    began = time.perf_counter()
    first = Meter(launched_s=5.0)
    first.peak = Peak(1e9, "here")
    first.enter("forward_backward")
    time.sleep(0.05)
    with first.within("evaluation"):
        time.sleep(0.02)
    first.count_step(8, 100, 3e6)
    first.computed = first.real = 100
    first.enter("saving")
    summary = first.summary(1)
    taken = time.perf_counter() - began
    assert set(summary["seconds_by_part"]) == set(PARTS)
    assert sum(summary["seconds_by_part"].values()) == pytest.approx(5 + taken, abs=0.01)
    assert summary["seconds_by_part"]["evaluation"] >= 0.02
    trained = first.training_s
    with first.within("simple_models"):
        time.sleep(0.02)
    assert first.training_s == trained, "no rate of a training contains the models beside it"
    assert 0.05 <= trained < 0.5
    assert summary["mfu"] == pytest.approx(3e6 / (1e9 * trained), rel=1e-3)

    state = json.loads(json.dumps(first.state()))
    second = Meter(launched_s=1.0)
    second.restore(state)
    second.peak = Peak(3e9, "faster")
    second.enter("forward_backward")
    time.sleep(0.03)
    second.count_step(8, 100, 3e6)
    second.enter("saving")
    summary, mine = second.summary(2), second.training_s - trained
    assert summary["mfu"] == pytest.approx(6e6 / (1e9 * trained + 3e9 * mine), rel=1e-3)
    assert share_of_peak(3e9, 4e9) == 0.75 and share_of_peak(3e9, 2e9) is None and share_of_peak(0.0, 0.0) is None
    assert summary["examples_per_step"] == 8
    assert summary["tokens_per_second"] == pytest.approx(200 / second.training_s, rel=1e-3)
    assert 5.99 < summary["seconds_by_part"]["startup"] < 6.5


def test_the_best_peak_of_all_attempts_counts_on_the_same_kind_of_machine() -> None:
    """One is measured too low where others use the cores; the share would jump at a resume."""
    first, elsewhere = Meter(), Meter()
    first.peak = elsewhere.peak = Peak(4e9, "here")
    first.seconds["forward_backward"] = 10.0
    first.flops = 2e10
    for peak, best in ((1e9, 4e9), (5e9, 5e9)):
        second = Meter()
        second.peak = Peak(peak, "here")
        second.restore(json.loads(json.dumps(first.state())))
        third = Meter()
        third.peak = Peak(2e9, "here")
        third.restore(json.loads(json.dumps(second.state())))
        for resumed in (second, third):
            assert resumed.peak == Peak(best, "here")
            assert resumed.summary(1)["mfu"] == pytest.approx(2e10 / (best * 10), rel=1e-3)
    elsewhere.peak = Peak(1e9, "on another number of threads")
    elsewhere.restore(json.loads(json.dumps(first.state())))
    assert elsewhere.peak.flops == 1e9 and elsewhere.summary(1)["mfu"] == pytest.approx(0.5, rel=1e-3)


def test_the_time_that_is_left_follows_from_steps_after_the_first_and_contains_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first step takes 5 s, the others 1 s, for 300 tokens each; 1,200 tokens are evaluated twice more."""
    from afina.worker.training import live_progress

    now, events, meter = [0.0], [], Meter()
    meter.real = meter.computed = 1
    monkeypatch.setattr(live_progress, "EVERY_S", 5.0)
    monkeypatch.setattr(live_progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Meter, "training_s", property(lambda _: now[0]))
    attempt = SimpleNamespace(
        meter=meter,
        schedule=Schedule.of(80, 8, max_steps=20),
        early_stop=None,
        data=SimpleNamespace(splits={"eval": SimpleNamespace(lengths=np.full(12, 100))}),
        event=lambda kind, **fields: events.append(fields),
    )
    progress, state = live_progress.LiveProgress(attempt), SimpleNamespace(global_step=0, max_steps=20, epoch=0.0)  # type: ignore[arg-type]
    progress.on_train_begin(None, state, None)
    for state.global_step in range(1, 14):
        now[0] += 5 if state.global_step == 1 else 1
        meter.count_step(8, 300, 1e9)
        progress.on_step_end(None, state, None)
        if state.global_step == 10:
            meter.seconds["evaluation"], meter.evaluations = 7.0, 1
    assert [event["step"] for event in events] == [7, 13]
    assert events[0]["tokens_per_s"] == 300 and events[0]["examples_per_s"] == 8
    assert events[0]["seconds_left"] == pytest.approx(13 * 1 + 2 * 1200 / 300 / 3, abs=0.05)
    assert events[1]["seconds_left"] == 7 * 1 + 7


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


@pytest.mark.timeout(200)
def test_a_run_records_where_its_time_went(tmp_path: Path) -> None:
    recipe = tiny.write_project(tmp_path, train={"epochs": 12})
    env = {"AFINA_SCRATCH": str(tmp_path / "scratch")}
    live = "afina.worker.training.live_progress"
    constants = {f"{live}.FIRST_S": 0.1, f"{live}.EVERY_S": 0.3}
    run = train_here(recipe, tmp_path / "paced", env=env, constants=constants)
    outcome = json.loads((run / "outcome.json").read_text())
    used = outcome["utilisation"]
    assert 0.85 < used["real_token_share"] <= 1.0, "a few tokens more, where oneDNN multiplies"
    parts = used["seconds_by_part"]
    # Without a launcher an attempt counts from its first event, which ends its start.
    assert sum(parts.values()) - parts["startup"] == pytest.approx(outcome["seconds"], abs=0.5) and parts["startup"] > 0
    assert min(parts[p] for p in ("startup", "input", "forward_backward", "optimizer", "evaluation", "saving")) > 0
    assert 0 < used["mfu"] < 1 and used["peak_flops"] > 1e9 and used["peak_memory_gb"] > 0.1
    tokens = np.load(next((tmp_path / "scratch/prepared").glob("*/train.offsets.npy")))[-1] * 12
    trained = sum(parts[p] for p in ("input", "forward_backward", "optimizer", "other"))
    assert used["tokens_per_second"] == pytest.approx(tokens / trained, rel=0.01)
    assert used["examples_per_step"] == pytest.approx(156 * 12 / outcome["global_step"], abs=1e-3)
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
