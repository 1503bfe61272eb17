"""Commands that use trained models: predict, export, ensemble."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from afina.cli.options import json_option, reading_options, request_options, run_argument, runs_argument, submit_option
from afina.errors import InputError
from afina.run.job_request import JobRequest
from afina.text import plural

__all__ = ["COMMANDS"]


@click.command()
@run_argument
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    "out",
    metavar="FILE",
    help="A .parquet, .csv, .tsv or .jsonl file; by default <input>.predictions.parquet here, standard output for `-`.",
)
@click.option(
    "--text", metavar="COLUMN[,COLUMN]", help="The column with the texts, or several; by default as in training."
)
@reading_options
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
@click.option("--plain", is_flag=True, help="Leave out a temperature and thresholds that were fitted for the model.")
@click.option(
    "--abstain-below",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="No prediction for texts of which the model is less sure than P; adds the column confidence.",
)
@click.option("--chunk-rows", type=click.IntRange(1), metavar="N", help="Rows that are predicted and written together.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Precision of the weights.",
)
@request_options(
    "num_processes",
    "site",
    "time_min",
    "gpus_per_node",
    num_processes="By default one per GPU, or one.",
    site="Site file; by default the site of the run.",
    time_min="With --submit: minutes, HH:MM:SS or D-HH:MM:SS.",
    gpus_per_node={"type": click.IntRange(0, 1), "help": "With --submit: 0 predicts on the CPU."},
)
@submit_option(default=False, what="Predict")
@click.option("--array", type=click.IntRange(1), metavar="N", help="With --submit: N jobs, each takes a share.")
@click.option(
    "--dry-run", is_flag=True, help="Print what would be predicted, and with --submit the job; change nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON at the end.")
def predict(run_dir: str, inputs: tuple[str, ...], out: str | None, request: JobRequest, **options: Any) -> None:
    """Predict with the model of RUN (or a model folder) on INPUTS: CSV, TSV, JSON Lines, Parquet, folders or patterns
    of them, or `-`: texts from standard input, one a line.

    Every row of the input comes back in its order, with its prediction and a probability for each label. The same command
    continues one that was killed or interrupted; the output is identical to that of an uninterrupted command.

    \b
    Examples:
      afina predict RUN new.csv -o new.predictions.parquet
      afina predict RUN 'shards/*.parquet' -o all.csv --text body --keep id
      echo 'What a phone!' | afina predict RUN -
      afina predict RUN big.parquet -o out.parquet --submit --array 8 --time 2:00:00
    """
    from afina.prediction import jobs as predicting
    from afina.prediction.request import PredictRequest

    submitted, array, dry_run, as_json = (options.pop(name) for name in ("submitted", "array", "dry_run", "as_json"))
    _check_job_options(request, submitted, array)
    columns = options.pop("text")
    asked = PredictRequest(**options, text=columns.split(",") if columns else (), job=request)
    if inputs == ("-",) and out is None and not (submitted or dry_run):
        _to_standard_output(run_dir, asked)
        return
    job = predicting.compose(run_dir, inputs, out, asked)
    if dry_run:
        shown = shlex.join(predicting.submission(job, array or 1)) if submitted else ""
        print(job.model_dump_json(indent=2), *(["# would run", shown] if shown else []), sep="\n")
        return
    if submitted:
        about = predicting.submit_prediction(job, array=array or 1)
        print(json.dumps(about, ensure_ascii=False) if as_json else _submitted(about))
        return
    try:
        summary = predicting.predict_here(job, request.num_processes)
    except KeyboardInterrupt:
        command = shlex.join(["afina", *sys.argv[1:]])
        print(f"\nafina: interrupted; finished chunks are kept. Continue with: {command}", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(summary, ensure_ascii=False) if as_json else _summary(summary))


def _check_job_options(request: JobRequest, submitted: bool, array: int | None) -> None:
    of_a_job = {"--array": array, "--time": request.time_min, "--gpus-per-node": request.gpus_per_node}
    for name, value in of_a_job.items():
        if value is not None and not submitted:
            raise InputError(f"{name} is for a Slurm job", "add --submit, or leave it out")


def _submitted(about: dict[str, Any]) -> str:
    tasks = f", {about['tasks']} tasks" if about["tasks"] > 1 else ""
    rows = about["rows"] - about["rows_done"]
    return (
        f"afina: submitted job {about['job_id'].partition(';')[0]}{tasks}: {plural(rows, 'row')} in {plural(about['chunks'] - about['done'], 'chunk')}\n"
        f"afina: the last of them writes {about['out']}"
    )


@click.command()
@run_argument
@click.option("-o", "--output", "out", metavar="DIR", help="A new folder; by default one with the recipe's name here.")
@click.option("--onnx", is_flag=True, help="Also as onnx/model.onnx, compared with PyTorch; needs the extra onnx.")
@click.option("--merge", is_flag=True, help="Of a run with an adapter: whole weights, with the adapter in them.")
@click.option("--site", metavar="FILE", help="Site file; by default the site of the run.")
@json_option
def export(run_dir: str, out: str | None, onnx: bool, merge: bool, site: str | None, as_json: bool) -> None:
    """Export the model of RUN as a folder to give away: safetensors, tokenizer, and a model card from the record.

    transformers.pipeline("text-classification", model=DIR) loads it, label names included. What only you can say in the
    card (what it is for, its limits, its license) is marked there.

    \b
    Examples:
      afina export RUN -o stars
      afina export RUN -o stars --onnx
      afina export RUN -o stars --merge
    """
    from afina.prediction import export as exporting
    from afina.text import size_in_words

    made = exporting.export(run_dir, out, onnx=onnx, merge=merge, site=site)
    if as_json:
        print(json.dumps(made, ensure_ascii=False))
        return
    print(f"afina: {made['out']} ({size_in_words(made['bytes'])}, {made['parameters']:,} parameters)")
    if made["onnx_difference"] is not None:
        print(f"  onnx/model.onnx: logits as PyTorch's, to {made['onnx_difference']:.1g}")
    print("  the card is README.md: fill in what is marked with ✎ before you publish it")


@click.command()
@runs_argument("RUN...", required=True)
@click.option("-o", "--output", "out", metavar="DIR", required=True, help="A new folder, which `afina predict` reads.")
@json_option
def ensemble(runs: tuple[str, ...], out: str, as_json: bool) -> None:
    """Average the probabilities of finished runs (seeds, points of a sweep, folds), and score the average on the rows that all of them were evaluated on.

    Nothing is trained: the predictions that the runs have stored are averaged, each after its temperature if one was fitted. The scores are
    compared, paired, with those of the best member and with the mean of the members. A folder stands for the runs below it.

    \b
    Examples:
      afina ensemble RUN1 RUN2 RUN3 -o committee
      afina predict committee new.csv
    """
    from afina.prediction.ensemble import make_ensemble

    record = make_ensemble(runs, out)
    print(json.dumps(record, ensure_ascii=False) if as_json else _scores_of_ensemble(record, out))


def _scores_of_ensemble(record: dict[str, Any], out: str) -> str:
    from afina.text import aligned, number, p_value

    def change(difference: dict[str, Any] | None) -> list[str]:
        if difference is None:
            return ["–"] * 3
        by, low, high = difference["second"] - difference["first"], difference["low"], difference["high"]
        limits = "–" if low is None or high is None else f"{low:+.4f} to {high:+.4f}"
        return [number(difference["first"]), f"{by:+.4f} ({limits})", p_value(difference["p"])]

    lines = [f"afina: {out}: {plural(len(record['members']), 'member')}, {record['task']}"]
    for split, about in record["splits"].items():
        best, mean = ({d["metric"]: d for d in about[key]} for key in ("against_best", "against_mean"))
        heads = ["score", "ensemble", "95 %", "best", "difference (95 %)", "p", "mean", "difference (95 %)", "p"]
        rows = [
            [name, number(value), f"{number(low)} to {number(high)}", *change(best.get(name)), *change(mean.get(name))]
            for name, (value, low, high) in about["scores"].items()
        ]
        lines += [
            "",
            f"{split}, {plural(about['rows'], 'row')}; best member by {record['metric']}: {about['best']}",
            *aligned([heads, *rows]),
        ]
    lines += ["", *record["notes"]]
    if record["splits"]:
        lines.append("Paired on the same rows: they cover sampling of rows, not randomness in training.")
    if "eval" in record["splits"] and "test" not in record["splits"]:
        lines.append("The best member was chosen on the same rows, which is a little kind to it.")
    return "\n".join(lines)


def _to_standard_output(run_dir: str, asked: Any) -> None:
    """Predictions for a pipe: JSON Lines, as soon as standard input has ended."""
    import shutil
    import tempfile

    from afina.prediction import jobs as predicting

    with tempfile.TemporaryDirectory(prefix="afina-predict-") as folder:
        out = Path(folder) / "out.jsonl"
        predicting.predict_here(predicting.compose(run_dir, ["-"], out, asked), asked.job.num_processes)
        with out.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.flush()


def _summary(summary: dict[str, Any]) -> str:
    if summary["state"] == "whole":
        return f"afina: {summary['out']} exists already, from the same inputs, model and options"
    lines = [
        f"afina: {plural(summary['rows'], 'row')} in {summary['seconds']:,.1f} s ({summary['rows_per_s']:,.3g} rows/s): {summary['out']}"
    ]
    fitted = {"temperature": 1, "thresholds": {}, **summary["decisions"]}
    if "members" in fitted:
        lines.append(f"  probabilities: the mean of {fitted['members']} models")
    named = [f"temperature {fitted['temperature']:g}"] if fitted["temperature"] != 1 else []
    if named := [*named, *(["thresholds"] if fitted["thresholds"] else [])]:
        lines.append(f"  with the {' and '.join(named)} fitted for this model; --plain leaves out what was fitted")
    if "unanswered" in summary:
        texts = summary["rows"] - summary["blank"]
        share = f" ({summary['unanswered'] / texts:.1%})" if texts else ""
        lines.append(f"  unanswered: {summary['unanswered']:,} of {texts:,} texts{share}")
    counts = summary.get("predictions") or {}
    if counts:
        most = sorted(counts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {count:,}" for name, count in most[:12])
        lines.append(f"  predicted: {shown}" + (f", and {len(most) - 12} labels more" if len(most) > 12 else ""))
    return "\n".join(lines)


COMMANDS = (predict, export, ensemble)
