"""A trained classifier in Python: `afina.load(run).predict(["What a phone!"])`.

The one place where the host imports the worker's code instead of starting a process, because a notebook needs the model as an
object. PyTorch and Transformers must be installed here; no container is started. The import happens when `load` is called, so
`import afina` stays fast.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from afina.errors import EnvironmentProblem, InputError, check_argument
from afina.prediction.request import find_model
from afina.watch.find import resolve_folder

if TYPE_CHECKING:
    from afina.worker.inference.classifier import Classifier

__all__ = ["load"]


def load(
    run: str | os.PathLike[str],
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    dtype: Any = "float32",
    device: str | None = None,
    plain: bool = False,
) -> Classifier:
    """The model of a run directory (or a model folder), ready to predict as `afina predict` does.

    Args:
        batch_size: rows of a padded batch, and 128 tokens for each of them in a packed one.
        max_tokens: tokens of a packed batch.
        dtype: float32, bfloat16 or float16.
        device: `cpu`, `cuda:1`, …; by default the first GPU, or the CPU.
        plain: leave out a temperature and thresholds that were fitted for the model.

    Returns: an object with `predict(texts)`, `predict_proba(texts)`, `labels`, `task`, `model` and `tokenizer`.

    Raises:
        InputError: no such run, no model in it, a damaged file.
        EnvironmentProblem: PyTorch or Transformers is not installed here.
    """
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        check_argument(name, value, (int,), "a whole number", least=1)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype: must be float32, bfloat16 or float16, found {dtype!r}", "give its name as text")
    check_argument("plain", plain, (bool,), "True or False", required=True)
    check_argument("device", device, (str,), "a device such as cpu or cuda:1")
    directory, folder = find_model(resolve_folder(run))
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"afina.load: {' and '.join(missing)} is not installed in this Python",
            "pip install '.[train]' in a checkout of afina, or predict in the image with `afina predict`",
        )
    from afina.worker.inference.classifier import Classifier

    recipe = directory.plan().recipe if directory is not None else None
    classifier = Classifier(
        folder,
        tokens=recipe.tokens if recipe else None,
        text_columns=recipe.data.text if recipe else None,
        batch_size=batch_size,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
        trust_remote_code=recipe.trust_remote_code if recipe else False,
    )
    return classifier if plain else classifier.as_fitted()
