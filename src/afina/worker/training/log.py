"""What a run says in its log at its start and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from afina.run.directory import RunDir
from afina.run.outcome import Outcome
from afina.run.plan import Geometry, Plan

__all__ = ["introduce", "say", "table", "utilisation"]


def say(*lines: str) -> None:
    for line in lines:
        print(f"afina: {line}", flush=True)


def introduce(plan: Plan, geometry: Geometry, manifest: dict[str, Any], device: Any, resume: Path | None) -> None:
    rows = ", ".join(f"{part} {split['rows']}" for part, split in manifest["splits"].items())
    say(
        f"{plan.recipe.name}: {manifest['task']}, {plan.recipe.model}; rows: {rows}",
        f"{geometry.num_processes} process(es) on {geometry.nodes} node(s), {device.type}; global batch {geometry.global_batch} = "
        f"{geometry.batch_per_device} × {geometry.accumulation} × {geometry.num_processes}",
        *([f"resuming from {resume.name}"] if resume else []),
    )


def table(run: RunDir, metric_names: list[str]) -> str:
    """The tutorial's table: one line per evaluation, with the training loss logged last before it."""
    logged = list(run.metrics())
    scalar = [m for m in metric_names if any(isinstance(line.get(f"eval_{m}"), float) for line in logged)]
    head = ["epoch", "training loss", "validation loss", *scalar]
    rows: list[list[str]] = []
    loss: float | None = None
    for line in logged:
        loss = line.get("loss", loss)
        if "eval_loss" in line:
            values = [line.get(f"eval_{name}") for name in scalar]
            cells = [loss, line["eval_loss"], *(v if isinstance(v, float) else None for v in values)]
            rows.append([f"{line['epoch']:g}", *("-" if v is None else f"{v:.6f}" for v in cells)])
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:], ""])


def utilisation(outcome: Outcome) -> list[str]:
    """How the machine was used: a line of rates, and one of where the time went."""
    used = outcome.utilisation
    parts = [f"{seconds:.1f} {name}" for name, seconds in used.get("seconds_by_part", {}).items() if seconds >= 0.05]
    rates = [
        f"{outcome.samples_per_second:.1f} examples/s" if outcome.samples_per_second else "",
        f"{used['tokens_per_second']:,.0f} real tokens/s" if used.get("tokens_per_second") else "",
        f"{used['real_token_share']:.1%} of all tokens are real" if used.get("real_token_share") else "",
        f"{used['mfu']:.1%} of {used['peak_flops'] / 1e12:.3g} TFLOP/s ({used['peak_source']})"
        if used.get("mfu")
        else "",
        f"{used['peak_memory_gb']:.2f} GB at most" if used.get("peak_memory_gb") else "",
    ]
    said = [", ".join(filter(None, rates)), f"seconds: {', '.join(parts).replace('_', ' and ')}" if parts else ""]
    return [line for line in said if line]
