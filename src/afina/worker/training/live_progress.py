"""What is seen of a training while it runs: a bar on a terminal, a line in the log, a `pace` event once a minute.

Rates are those of the time since the last pace. Nothing is computed for them on the device: a step costs two comparisons.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from afina.worker.training.meter import peak_memory_bytes, share_of_peak

if TYPE_CHECKING:
    from afina.worker.training.trainer import RunTrainer

__all__ = ["Pace"]

#: Seconds of an attempt's training before its first pace, and between two.
FIRST_S, EVERY_S = 10.0, 60.0


class Pace(TrainerCallback):  # type: ignore[misc]
    """On rank 0: a bar where there is a terminal, else lines; and the events."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer
        self.bar: Any = None
        self.loss: float | None = None
        self.due = float("inf")
        self.before: tuple[float, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.due = time.monotonic() + FIRST_S
        self._mark(state)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)
        elif state.global_step == self.trainer.began_at + 1:
            print(_place(state), flush=True)
        if time.monotonic() > self.due:
            self.due = time.monotonic() + EVERY_S
            pace = self._pace(state)
            self.trainer.run.event("pace", attempt=self.trainer.attempt, **pace)
            if self.bar is not None:
                self.bar.set_postfix_str("  ".join(_spoken(pace)))
            else:
                print("  ".join([_place(state), *_spoken(pace)]), flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self.loss = logs["loss"]
        if "eval_loss" in logs:
            shown = {
                k: v
                for k, v in logs.items()
                if k.startswith("eval_") and isinstance(v, float) and not k.endswith(("_runtime", "_per_second"))
            }
            line = "  ".join([_place(state), *(f"{k} {v:.4f}" for k, v in shown.items())])
            self.bar.write(line) if self.bar is not None else print(line, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _mark(self, state: Any) -> tuple[float, ...]:
        """What was reached by now; returns what has been added since the last mark."""
        meter = self.trainer.meter
        now = (meter.training_s, state.global_step, meter.examples, meter.tokens, meter.flops)
        added = tuple(b - a for a, b in zip(self.before, now, strict=True)) if self.before else now
        self.before = now
        return added

    def _pace(self, state: Any) -> dict[str, Any]:
        meter = self.trainer.meter
        seconds, steps, examples, tokens, flops = self._mark(state)
        each_evaluation = meter.seconds["evaluation"] / meter.evaluations if meter.evaluations else 0.0
        left = (state.max_steps - state.global_step) * seconds / steps
        left += self.trainer.schedule.evaluations_after(state.global_step) * each_evaluation
        return {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "epoch": round(state.epoch, 4),
            "loss": self.loss,
            "examples_per_s": round(examples / seconds, 2),
            "tokens_per_s": round(tokens / seconds, 1),
            "real_token_share": round(meter.real / meter.computed, 4),
            "mfu": share_of_peak(flops, seconds * meter.peak.flops) if meter.peak else None,
            "seconds_left": round(left, 1),
            "memory_gb": round(peak_memory_bytes() / 1e9, 3),
        }


def _place(state: Any) -> str:
    return f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}"


def _spoken(pace: dict[str, Any]) -> list[str]:
    minutes = pace["seconds_left"] / 60
    left = (
        f"{minutes * 60:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    )
    return [
        *([f"loss {pace['loss']:.4f}"] if pace["loss"] is not None else []),
        f"{pace['tokens_per_s']:,.0f} tokens/s",
        *([f"{pace['mfu']:.0%} of the peak"] if pace["mfu"] is not None else []),
        f"{left} left",
    ]
