"""Commands that use a trained model: predict, export."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from afina.cli.options import minutes

__all__ = ["COMMANDS"]


@click.command()
@click.argument("run_dir")
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    "out",
    metavar="FILE",
    help="A .parquet, .csv, .tsv or .jsonl file; by default <input>.predictions.parquet here, standard output for `-`.",
)
@click.option(
    "--text", metavar="COLUMN[,COLUMN]", help="The column with the texts, two for pairs; by default as in training."
)
@click.option(
    "--keep",
    type=click.Choice(["all", "id"]),
    default="all",
    show_default=True,
    help="Columns of the input in the output: all, or file, row (and the recipe's id).",
)
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Texts of a batch; 128 N tokens of a packed one."
)
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Tokens of a packed batch.")
@click.option("--chunk-rows", type=click.IntRange(1), metavar="N", help="Rows that are predicted and written together.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--num-processes", type=click.IntRange(1), metavar="N", help="By default one per GPU, or one.")
@click.option("--site", metavar="FILE", help="Site file; by default the site of the run.")
@click.option("--submit", "submitted", is_flag=True, help="As a Slurm job; the same command without it merges the end.")
@click.option("--array", type=click.IntRange(1), metavar="N", help="With --submit: N jobs, each takes a share.")
@click.option(
    "--time", "time_limit", callback=minutes, metavar="TIME", help="With --submit: minutes, HH:MM:SS or D-HH:MM:SS."
)
@click.option("--gpus-per-node", type=click.IntRange(0, 1), metavar="N", help="With --submit: 0 predicts on the CPU.")
@click.option(
    "--dry-run", is_flag=True, help="Print what would be predicted, and with --submit the job; change nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON at the end.")
def predict(
    run_dir: str,
    inputs: tuple[str, ...],
    out: str | None,
    text: str | None,
    keep: Any,
    batch_size: int | None,
    max_tokens: int | None,
    chunk_rows: int | None,
    dtype: str,
    num_processes: int | None,
    site: str | None,
    submitted: bool,
    array: int | None,
    time_limit: int | None,
    gpus_per_node: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Predict with the model of RUN_DIR (or a model folder) on INPUTS: CSV, TSV, JSON Lines, Parquet, folders or patterns
    of them, or `-`: texts from standard input, one a line.

    Every row of the input comes back in its order, with its prediction and a probability for each label. What is killed or
    interrupted is continued by the same command; the output is the one of a command that nobody stopped.

    \b
    Examples:
      afina predict RUN_DIR new.csv -o new.predictions.parquet
      afina predict RUN_DIR 'shards/*.parquet' -o all.csv --text body --keep id
      echo 'What a phone!' | afina predict RUN_DIR -
      afina predict RUN_DIR big.parquet -o out.parquet --submit --array 8 --time 2:00:00
    """
    from afina.errors import InputError
    from afina.prediction import jobs as predicting

    for name, value in {"--array": array, "--time": time_limit, "--gpus-per-node": gpus_per_node}.items():
        if value is not None and not submitted:
            raise InputError(f"{name} is for a Slurm job", "add --submit, or leave it out")
    columns = text.split(",") if text else []
    options: dict[str, Any] = {
        "text": columns,
        "keep": keep,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "dtype": dtype,
        "chunk_rows": chunk_rows,
        "site": site,
    }
    if inputs == ("-",) and out is None and not (submitted or dry_run):
        _to_standard_output(run_dir, options, num_processes)
        return
    if submitted or dry_run:
        options |= {"gpus": gpus_per_node, "time_min": time_limit}
        job = predicting.compose(run_dir, inputs, out, **options)
        if dry_run:
            shown = shlex.join(predicting.submission(job, array or 1)) if submitted else ""
            print(job.model_dump_json(indent=2), *(["# would run", shown] if shown else []), sep="\n")
            return
        about = predicting.submit_prediction(job, array=array or 1)
        if as_json:
            print(json.dumps(about, ensure_ascii=False))
            return
        tasks = f", {about['tasks']} tasks" if about["tasks"] > 1 else ""
        rows = about["rows"] - about["rows_done"]
        print(
            f"afina: submitted job {about['job_id']}{tasks}: {rows:,} rows in {about['chunks'] - about['done']} chunks"
        )
        print(f"afina: {about['out']} is there when the last of them has ended")
        return
    try:
        summary = predicting.predict(run_dir, inputs, out, **options, num_processes=num_processes)
    except KeyboardInterrupt:
        print(f"\nafina: interrupted; what is done is kept. Go on with: {_again()}", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(summary, ensure_ascii=False) if as_json else _told(summary))


@click.command()
@click.argument("run_dir")
@click.option("-o", "--output", "out", metavar="DIR", help="A new folder; by default one with the recipe's name here.")
@click.option("--onnx", is_flag=True, help="Also as onnx/model.onnx, compared with PyTorch; needs the extra onnx.")
@click.option("--site", metavar="FILE", help="Site file; by default the site of the run.")
@click.option("--json", "as_json", is_flag=True)
def export(run_dir: str, out: str | None, onnx: bool, site: str | None, as_json: bool) -> None:
    """Export the model of RUN_DIR as a folder to give away: safetensors, tokenizer, and a model card from the record.

    transformers.pipeline("text-classification", model=DIR) loads it, label names included. What only you can say in the
    card (what it is for, its limits, its license) is marked there.

    \b
    Examples:
      afina export RUN_DIR -o stars
      afina export RUN_DIR -o stars --onnx
    """
    from afina.prediction import export as exporting

    made = exporting.export(run_dir, out, onnx=onnx, site=site)
    if as_json:
        print(json.dumps(made, ensure_ascii=False))
        return
    print(f"afina: {made['out']} ({made['bytes'] / 1e6:,.1f} MB, {made['parameters']:,} parameters)")
    if made["onnx_difference"] is not None:
        print(f"  onnx/model.onnx: logits as PyTorch's, to {made['onnx_difference']:.1g}")
    print("  the card is README.md: write what is marked with ✎ before you publish it")


def _again() -> str:
    return shlex.join(["afina", *sys.argv[1:]])


def _to_standard_output(run_dir: str, options: dict[str, Any], num_processes: int | None) -> None:
    """Predictions for a pipe: JSON Lines, as soon as standard input has ended."""
    import shutil
    import tempfile

    from afina.prediction import jobs as predicting

    with tempfile.TemporaryDirectory(prefix="afina-predict-") as folder:
        out = Path(folder) / "out.jsonl"
        predicting.predict(run_dir, "-", out, **options, num_processes=num_processes)
        with out.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.flush()


def _told(summary: dict[str, Any]) -> str:
    if summary["state"] == "whole":
        return f"afina: {summary['out']} is there already, of the same inputs, model and options"
    lines = [
        f"afina: {summary['rows']:,} rows in {summary['seconds']:,.1f} s ({summary['rows_per_s']:,.3g} rows/s): {summary['out']}"
    ]
    counts = summary.get("predictions") or {}
    if counts:
        most = sorted(counts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {count:,}" for name, count in most[:12])
        lines.append(f"  predicted: {shown}" + (f", and {len(most) - 12} labels more" if len(most) > 12 else ""))
    return "\n".join(lines)


COMMANDS = (predict, export)
