"""Exports a finished run, by a worker, as a folder that Transformers, the Hub and `afina predict` read."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from afina.errors import InputError, check_argument
from afina.prediction.jobs import site_for, worker_env
from afina.prediction.request import find_model, plan_of
from afina.run.commands import worker_argv
from afina.run.workers import ask_worker
from afina.site.image import check_image
from afina.watch.find import resolve_folder

__all__ = ["export"]


def export(
    run: str | os.PathLike[str],
    out: str | Path | None = None,
    *,
    onnx: bool = False,
    merge: bool = False,
    site: str | Path | None = None,
) -> dict[str, Any]:
    """Write safetensors, tokenizer, model card (and ONNX) into a new folder.

    Args:
        out: by default a folder with the recipe's name in the working directory.
        onnx: also as `onnx/model.onnx`, compared with PyTorch; needs the extra `onnx`.
        merge: of a run with an adapter: whole weights, with the adapter in them.

    Returns: out, bytes, parameters, onnx_difference (the largest of any logit).

    Raises:
        AfinaError: as the command says it.
    """
    for name, path in (("out", out), ("site", site)):
        check_argument(name, path, (str, Path), "a path")
    for name, flag in (("onnx", onnx), ("merge", merge)):
        check_argument(name, flag, (bool,), "True or False", required=True)
    directory, model = find_model(resolve_folder(run))
    if directory is None:
        raise InputError(
            f"{run}: is a model folder already, not a run directory", "give the run directory that it came from"
        )
    target = Path(out).expanduser().absolute() if out is not None else Path(directory.plan().recipe.name).absolute()
    if target.exists():
        raise InputError(f"{target}: exists; nothing that exists is overwritten", "choose another folder with -o")
    if not target.parent.is_dir():
        raise InputError(
            f"-o {target}: there is no folder {target.parent}", shlex.join(["mkdir", "-p", str(target.parent)])
        )
    plan = plan_of(directory, model, [], site_for(directory, site), gpus=0)
    check_image(plan.site)
    argv = worker_argv(plan, "export", binds=[directory.path, target.parent])
    question = {"run": str(directory.path), "out": str(target), "onnx": onnx, "merge": merge}
    return ask_worker(argv, worker_env(plan), question, name="the export")
