"""Commands that look at runs and change nothing in them: status."""

from __future__ import annotations

import json
from typing import Any

import click

__all__ = ["COMMANDS"]


@click.command()
@click.argument("run_dir")
@click.option("--json", "as_json", is_flag=True)
def status(run_dir: str, as_json: bool) -> None:
    """The state of RUN_DIR, its step and its metrics.

    \b
    Example:
      afina status /scratch/me/runs/yelp-1a2b3c4d-1 --json
    """
    from afina import jobs

    run = jobs.Run(run_dir)
    outcome, lines = run.outcome, run.metrics()
    record: dict[str, Any] = {
        "run": str(run.path),
        "state": run.state,
        "job_id": run.job_id,
        "step": lines[-1]["step"] if lines else 0,
        "metrics": outcome.metrics if outcome else {},
        "error": outcome.error if outcome else None,
    }
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
        return
    print(f"{record['state']}  step {record['step']}  job {record['job_id'] or '-'}  {run.path}")
    for name, value in record["metrics"].items():
        if isinstance(value, float):
            print(f"  {name} {value:.6f}")
    if record["error"]:
        print(f"  {record['error']}")


COMMANDS = (status,)
