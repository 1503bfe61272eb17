"""Exports a finished run as a model folder to publish: `python -m afina.worker export < request.json`.

    DIR/  config.json, model.safetensors     as the run's model/; of a run with an adapter its adapter and head, or merged if asked for
          tokenizer …                        as the run's model/; its longest input is that of the training
          decisions.json                     temperature and thresholds, where the run has fitted them
          afina.json                         text columns and longest input, for predictions with this folder
          README.md                          the model card (`afina.worker.inference.model_card`)
          onnx/model.onnx                    if asked for, and equal to PyTorch (`afina.worker.inference.onnx_export`)

Written aside and published by rename: the folder appears complete, and nothing that exists is overwritten.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from afina.errors import InputError
from afina.files import name_aside
from afina.publish import rename_new
from afina.recipe.local_model import adapter_base
from afina.run.directory import RunDir
from afina.version import __version__
from afina.worker.model.adapters import labels_config, load_merged
from afina.worker.reply import read_question

__all__ = ["answer", "export", "export_info"]

_INFO = "afina.json"

#: Files of a run's model folder that are not exported.
_LEFT_OUT = ("README.md", "training_args.bin")
_COMPARED = 26


def answer(arguments: list[str]) -> dict[str, Any]:
    """The question is {"run": …, "out": …, "onnx": …, "merge": …}, as `export`."""
    return export(**read_question("a request to export"))


def export(run: str, out: str, onnx: bool, merge: bool = False) -> dict[str, Any]:
    """Publish the model of `run` at `out`.

    Args:
        onnx: also as ONNX; with an adapter the merged model.
        merge: write whole weights, with the adapter in them.

    Raises:
        InputError: the run has not finished, its model is damaged, `out` exists, there is nothing to merge.
        EnvironmentProblem: the extra `onnx` is missing.
    """
    from dataclasses import replace

    from afina.worker.inference.model_card import facts_of, model_card
    from afina.worker.model.model_files import check_files

    directory, final = RunDir(run), Path(out)
    outcome = directory.outcome()
    if outcome is None or outcome.outcome != "finished":
        how = f"it is {outcome.outcome}" if outcome else "it has not finished"
        raise InputError(
            f"{run}: nothing to export: {how}", f"`{shlex.join(['afina', 'resume', str(run)])}` continues it"
        )
    check_files(directory.model, "the run's model is damaged: copy the run directory again")
    adapted = adapter_base(directory.model) is not None
    if merge and not adapted:
        raise InputError(f"--merge: {run} has trained all weights: there is no adapter to merge", "leave --merge out")
    if onnx:
        from afina.worker.inference.onnx_export import check_installed, export_onnx

        check_installed()
    facts = replace(facts_of(directory, outcome), onnx=onnx, adapter=adapted and not merge)
    recipe = facts.plan.recipe
    aside = name_aside(final)
    aside.mkdir()
    try:
        _copy_model(directory.model, aside, merge, recipe.trust_remote_code)
        _limit_tokenizer(aside, recipe.tokens.max_length)
        info = {
            "afina": __version__,
            "task": outcome.task,
            "text_columns": list(recipe.data.text),
            **recipe.tokens.encoding,
        }
        (aside / _INFO).write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(model_card(facts), encoding="utf-8")
        difference = None
        if onnx:
            whole = aside / ".merged" if adapted and not merge else aside
            if whole != aside:
                _copy_model(directory.model, whole, True, recipe.trust_remote_code)
            target, longest = aside / "onnx/model.onnx", recipe.tokens.max_length
            difference = export_onnx(whole, target, _texts(directory), longest, recipe.trust_remote_code)
            shutil.rmtree(aside / ".merged", ignore_errors=True)
        if not rename_new(aside, final):
            raise InputError(f"{final}: exists; nothing that exists is overwritten", "choose another folder with -o")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(path.stat().st_size for path in final.rglob("*") if path.is_file())
    return {"out": str(final), "bytes": size, "parameters": facts.parameters, "onnx_difference": difference}


def _copy_model(model: Path, target: Path, merge: bool, trust_remote_code: bool) -> None:
    """Copy the model's folder; with `merge` whole weights take the place of its adapter."""
    target.mkdir(exist_ok=True)
    labels = labels_config(model)
    for path in sorted([*model.iterdir(), *([] if labels == model else labels.iterdir())]):
        of_adapter = path.parent == labels != model or path.name.startswith("adapter_")
        if path.is_file() and path.name not in _LEFT_OUT and not (merge and of_adapter):
            (target / path.relative_to(model)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(model))
    if merge:
        load_merged(model, trust_remote_code).save_pretrained(target)


def export_info(folder: Path) -> dict[str, Any]:
    """`text_columns`, `max_length` and the like, `task` of an exported folder; empty where it has no `afina.json`.

    Raises:
        InputError: it cannot be read.
    """
    try:
        info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"model: {folder / _INFO} cannot be read: {error}", "export the model again") from None
    return info if isinstance(info, dict) else {}


def _limit_tokenizer(folder: Path, max_length: int) -> None:
    """The length of training becomes the tokenizer's own: `truncation=True` then cuts where training did."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    # What a call in training left behind, and where it was loaded from.
    for name in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only"):
        config.pop(name, None)
    config["model_max_length"] = max_length
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _texts(run: RunDir) -> list[Any]:
    """Texts of the evaluation set, short and long ones, to compare two models on; made-up ones where there are none."""
    import pyarrow.parquet as pq

    rows: list[Any] = []
    if run.predictions.is_file():
        names = pq.read_schema(run.predictions).names
        columns = [name for name in ("text", "text_pair") if name in names]
        table = pq.read_table(run.predictions, columns=columns)
        rows = list(zip(*(table.column(name).to_pylist() for name in columns), strict=True))
        rows.sort(key=lambda row: sum(map(len, row)))
        rows = [rows[i * len(rows) // _COMPARED] for i in range(min(_COMPARED, len(rows)))][::-1]
        rows = [row if len(row) > 1 else row[0] for row in rows]
    while len(rows) < _COMPARED:
        words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        text = " ".join(words[: 1 + len(rows) % 10] * (1 + len(rows) // 5))
        rows.append((text, text) if rows and isinstance(rows[0], tuple) else text)
    return rows
