"""The schedule of a run against one that is walked through step by step."""

from __future__ import annotations

import math
import random

import pytest

from afina.schedule import Schedule


@pytest.mark.parametrize("seed", range(40))
def test_the_schedule_is_that_of_a_run_that_is_walked_through(seed: int) -> None:
    draw = random.Random(seed)
    rows, batch = draw.randint(1, 60), draw.randint(1, 20)
    epochs, max_steps = draw.choice([(None, draw.randint(1, 30)), (draw.choice([0.3, 1.0, 2.5, 3.0]), None)])
    evaluate, save_every = (draw.choice(["epoch", draw.randint(1, 9)]) for _ in range(2))
    schedule = Schedule.of(rows, batch, epochs=epochs, max_steps=max_steps, evaluate=evaluate, save_every=save_every)
    batches = [min(batch, rows - start) for start in range(0, rows, batch)]
    total = max_steps or math.ceil((epochs or 3) * len(batches))
    assert (schedule.total_steps, schedule.steps_per_epoch) == (total, len(batches))
    seen, evaluated = 0, []
    for step in range(1, total + 1):
        epoch, number = schedule.position(step)
        assert epoch * len(batches) + number == step - 1
        assert schedule.examples_of(step) == batches[number]
        seen += batches[number]
        assert schedule.examples_after(step) == seen
        ends = number == len(batches) - 1
        assert schedule.evaluates_at(step) == (step == total or (ends if evaluate == "epoch" else step % evaluate == 0))
        assert schedule.saves_at(step) == (step == total or (ends if save_every == "epoch" else step % save_every == 0))
        evaluated += [step] if schedule.evaluates_at(step) else []
    for step in range(total + 1):
        assert schedule.evaluations_after(step) == sum(after > step for after in evaluated), f"seed {seed}, step {step}"
    assert schedule.evaluations == len(evaluated)


def test_without_rows_to_evaluate_on_nothing_is_evaluated() -> None:
    schedule = Schedule.of(10, 4, epochs=2, evaluate=None)
    assert schedule.total_steps == 6 and schedule.evaluations == 0
    assert not any(schedule.evaluates_at(step) for step in range(1, 7))
