"""Live progress of a training: a bar on a terminal, a line in the log, a `pace` event once a minute.

Rates refer to the time since the previous event, at first since the first step: that one includes what happens only once. Nothing is computed for them on the device: a step costs two comparisons.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from afina.text import can_draw, seconds_in_words
from afina.worker.training.attempt import Attempt
from afina.worker.training.log import bar_stream
from afina.worker.training.meter import peak_memory_bytes, share_of_peak

__all__ = ["LiveProgress"]

#: Seconds from the start of the training to the first event, and between two events.
FIRST_S, EVERY_S = 10.0, 60.0


class LiveProgress(TrainerCallback):  # type: ignore[misc]
    """For rank 0: a bar on a terminal, else lines; and the events."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        self.first_step = 1
        self.bar: Any = None
        self.loss: float | None = None
        self.due = float("inf")
        self.before: tuple[float, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.due = time.monotonic() + FIRST_S
        self.first_step = state.global_step + 1
        self._since_last(state)
        terminal = bar_stream()
        if can_draw(terminal):
            from tqdm import tqdm

            # `ascii`: where the terminal's encoding has no blocks.
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                file=terminal,
                ascii="utf" not in (terminal.encoding or "").lower(),
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)
        elif state.global_step == self.first_step:
            print(_position(state), flush=True)
        if time.monotonic() > self.due:
            self.due = time.monotonic() + EVERY_S
            pace = self._pace(state)
            self.attempt.event("pace", **pace)
            if self.bar is not None:
                self.bar.set_postfix_str("  ".join(_in_words(pace | {"mfu": None, "seconds_left": None})))
            else:
                print("  ".join([_position(state), *_in_words(pace)]), flush=True)
        elif state.global_step == self.first_step:
            self._since_last(state)

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
            line = "  ".join([_position(state), *(f"{k} {v:.4f}" for k, v in shown.items())])
            print(line, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _since_last(self, state: Any) -> tuple[float, ...]:
        """Seconds of training, steps, examples, tokens and operations since the previous call."""
        meter = self.attempt.meter
        now = (meter.training_s, state.global_step, meter.examples, meter.tokens, meter.flops)
        added = tuple(b - a for a, b in zip(self.before, now, strict=True)) if self.before else now
        self.before = now
        return added

    def _pace(self, state: Any) -> dict[str, Any]:
        meter, schedule = self.attempt.meter, self.attempt.schedule
        seconds, steps, examples, tokens, flops = self._since_last(state)
        left = (state.max_steps - state.global_step) * seconds / steps
        if evaluations := schedule.evaluations_after(state.global_step):
            left += evaluations * self._evaluation_seconds(seconds / tokens)
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
            **({"waited": early.waited, "patience": early.patience} if (early := self.attempt.early_stop) else {}),
            "memory_gb": round(peak_memory_bytes() / 1e9, 3),
        }

    def _evaluation_seconds(self, each_token: float) -> float:
        """Of one evaluation: the mean so far; before the first, a third of what a training on so many tokens takes (forward of forward and backward).

        Args:
            each_token: seconds of training.
        """
        meter = self.attempt.meter
        if meter.evaluations:
            return meter.seconds["evaluation"] / meter.evaluations
        return float(self.attempt.data.splits["eval"].lengths.sum()) * each_token / 3


def _position(state: Any) -> str:
    return f"step {state.global_step}/{state.max_steps}  epoch {state.epoch:.2f}"


def _in_words(pace: dict[str, Any]) -> list[str]:
    return [
        *([f"loss {pace['loss']:.4f}"] if pace["loss"] is not None else []),
        f"{pace['tokens_per_s']:,.0f} tokens/s",
        *([f"{pace['mfu']:.0%} of the peak"] if pace["mfu"] is not None else []),
        *([f"{seconds_in_words(pace['seconds_left'])} left"] if pace["seconds_left"] is not None else []),
    ]
