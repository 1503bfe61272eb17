"""The request of a prediction: model, inputs, output and options as one frozen value, JSON both ways.

Composing it only reads the disk: which files a folder or a pattern names, whether a path is a run directory. It is carried out by
`afina.worker.predicting.stages`.
"""

from __future__ import annotations

import glob
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from pydantic import Field, ValidationError

from afina.errors import DataError, InputError, check_argument
from afina.files import nearest_path
from afina.formats.read_options import PLAIN, ReadOptions
from afina.frozen import FrozenModel
from afina.recipe.data_files import check_format, data_files, file_stem
from afina.recipe.keys.data_keys import Data
from afina.recipe.keys.resource_keys import Resources
from afina.recipe.keys.train_keys import Tokens
from afina.recipe.local_model import adapter_base, check_no_adapter
from afina.recipe.schema import Recipe
from afina.run.directory import RunDir, is_run_dir
from afina.run.job_request import JobRequest
from afina.run.plan import Plan, geometry_for
from afina.site.settings import Site
from afina.version import __version__

__all__ = [
    "CHUNK_ROWS",
    "ENSEMBLE",
    "OUTPUTS",
    "STDIN",
    "Keep",
    "Member",
    "PredictOptions",
    "PredictRequest",
    "Prediction",
    "find_inputs",
    "find_model",
    "folder_of",
    "plan_of",
    "reading_for",
    "result_name",
]

Keep = Literal["all", "id"]

#: The file that makes a folder an ensemble.
ENSEMBLE = "ensemble.json"
#: Standard input: one text a line.
STDIN = Path("-")
#: Output formats by suffix.
OUTPUTS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl"}
#: Rows of a chunk: at most this many are in memory, and are predicted again after a kill.
CHUNK_ROWS = 32_768


@dataclass(frozen=True, kw_only=True)
class PredictRequest:
    """Options of a prediction besides model, inputs and output. None means the default of the worker or the run.

    Attributes:
        text: the column with the texts, or several; by default those of the training.
        reading: how the files are read, a `ReadOptions` or a dictionary: `{"encoding": "cp1252"}`; by default as in training where the files are of such a format.
        keep: `all` columns of the input, or `id`: file, row and the recipe's id column.
        batch_size: rows of a padded batch, and 128 tokens for each of them in a packed one.
        max_tokens: tokens of a packed batch.
        dtype: float32, or bfloat16 or float16 on GPUs that are quicker with them.
        chunk_rows: rows that are predicted and written together.
        plain: leave out a temperature and thresholds that were fitted for the model.
        abstain_below: rows of which the model is less sure have no prediction; gives the column `confidence`.
        job: site and processes; of a job also its GPUs and time limit.
    """

    text: str | Sequence[str] = ()
    keep: Keep = "all"
    batch_size: int | None = None
    max_tokens: int | None = None
    dtype: str = "float32"
    chunk_rows: int | None = None
    plain: bool = False
    abstain_below: float | None = None
    reading: ReadOptions | Mapping[str, Any] = PLAIN
    job: JobRequest = JobRequest()

    def options(self) -> dict[str, object]:
        """The fields of a `Prediction` that are asked for."""
        options = {
            name: getattr(self, name) for name in ("batch_size", "max_tokens", "dtype", "chunk_rows", "abstain_below")
        }
        check_argument("text", self.text, (str, list, tuple), "a column, or a list of columns", of=(str,))
        text = (self.text,) if isinstance(self.text, str) else tuple(self.text or ())
        return {
            "text": text,
            "keep": self.keep,
            "plain": self.plain,
            **{name: value for name, value in options.items() if value is not None},
        }


class PredictOptions(TypedDict, total=False):
    """Keywords of `afina.predict`; see `PredictRequest` and `JobRequest`."""

    text: str | Sequence[str]
    reading: ReadOptions | Mapping[str, Any]
    keep: Keep
    batch_size: int | None
    max_tokens: int | None
    dtype: str
    chunk_rows: int | None
    plain: bool
    abstain_below: float | None
    num_processes: int | None
    site: str | Path | None


class Member(FrozenModel):
    """A model of an ensemble.

    Attributes:
        model: the model folder.
        tokens: how texts became tokens in its training.
    """

    model: Path
    tokens: Tokens
    trust_remote_code: bool = False


class Prediction(FrozenModel):
    """The request that a worker carries out. Paths are absolute.

    Attributes:
        plan: of the run; for a plain model folder, one made for it, so that containers are started in one way.
        trained: the model belongs to a run: recipe and text columns are those of its training.
        model: the model folder; of an ensemble that of the first member.
        members: of an ensemble, the first one too; empty: one model.
        inputs: files; `-` is standard input, of which `spool` is a copy.
        out: the output; its suffix is its format.
        text: columns of texts; empty: those of training, else `text`.
        reading: how the files are read; None: nothing differs from the formats' standard.
        keep: all columns of the input, or file, row (and id).
        batch_size, max_tokens: rows of a padded batch, tokens of a packed one; None: the classifier's own.
        dtype: of weights and computations.
        chunk_rows: most rows of a part.
        plain: a temperature and thresholds that were fitted for the model are left out.
        abstain_below: the least confidence of a prediction (`afina.statistics.calibration.confidence`); None: it is not computed.
    """

    plan: Plan
    trained: bool
    model: Path
    members: tuple[Member, ...] = ()
    inputs: tuple[Path, ...]
    spool: Path | None = None
    out: Path
    text: tuple[str, ...] = ()
    reading: ReadOptions | None = None
    keep: Keep = "all"
    batch_size: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    chunk_rows: Annotated[int, Field(ge=1)] = CHUNK_ROWS
    plain: bool = False
    abstain_below: Annotated[float, Field(ge=0, le=1)] | None = None

    @property
    def tokens(self) -> Tokens | None:
        """How texts became tokens in training; None where only the model folder can tell."""
        return self.plan.recipe.tokens if self.trained else None

    @property
    def trained_columns(self) -> tuple[str, ...]:
        """The text columns of the run's training; empty where the recipe is not known."""
        return self.plan.recipe.data.text if self.trained else ()

    @property
    def id_column(self) -> str | None:
        return self.plan.recipe.data.id if self.trained else None


def find_model(path: str | Path) -> tuple[RunDir | None, Path]:
    """The run (or None) and the model folder that a path names: a run directory, its `model/`, or a plain folder.

    Raises:
        InputError: no such folder, a run without a model.
    """
    folder = Path(path).expanduser().absolute()
    if folder.name == "model" and is_run_dir(folder.parent):
        folder = folder.parent
    if is_run_dir(folder):
        run = RunDir(folder)
        if not run.model.is_dir():
            outcome = run.outcome()
            how = f"it is {outcome.outcome}" if outcome else "it has not finished"
            raise InputError(
                f"{path}: this run has no model/ yet: {how}",
                f"see `{shlex.join(['afina', 'status', str(path)])}`; `afina resume` continues a run",
            )
        return run, run.model
    if (folder / ENSEMBLE).is_file():
        raise InputError(
            f"{path}: is an ensemble, not one model", "`afina predict` reads it; here name one of its members"
        )
    if not folder.is_dir():
        raise InputError(f"{path}: no such run directory or model folder", "give a run, or a folder with config.json")
    if adapter_base(folder) is not None:
        return None, folder
    check_no_adapter(str(folder), [entry.name for entry in folder.iterdir()])
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{path}: neither a run directory (plan.json) nor a model folder (config.json)",
            "give the folder that `afina train` or `afina submit` named, or one that `save_pretrained` wrote",
        )
    return None, folder


def find_inputs(named: Sequence[str | Path]) -> tuple[Path, ...]:
    """Files that paths, folders and patterns name, each once, in the order given; a folder's and a pattern's by name.

    Raises:
        DataError: nothing there, or a format that is not known.
    """
    if [str(name) for name in named] == ["-"]:
        return (STDIN,)
    if any(str(name) == "-" for name in named):
        raise InputError("-: standard input cannot be mixed with files", "give `-` alone, or files")
    return tuple(dict.fromkeys(path for name in named for path in _files(str(name))))


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        return data_files(path, name)
    paths = (
        [path]
        if path.exists()
        else sorted(p for p in map(Path.absolute, map(Path, glob.glob(str(Path(name).expanduser())))) if p.exists())
    )
    if not paths:
        raise DataError(f"{name}: no such file", nearest_path(path) or "paths are looked up in the working directory")
    for file in paths:
        check_format(file, str(file), also=(".txt",))
        try:
            with file.open("rb"):
                pass
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}", "check the path and its permissions") from None
    return paths


def reading_for(run: RunDir | None, files: Sequence[Path], asked: ReadOptions) -> ReadOptions | None:
    """The options of reading: those that are asked for, else those of the training that these files can use.

    Raises:
        InputError: an option is asked for that no file can use.
    """
    asked.check_used(files, "--{}".format)
    trained = run.plan().recipe.data.reading.given() if run else {}
    usable = {key: value for key, value in trained.items() if ReadOptions(**{key: value}).is_used_by(files)}
    options = {**usable, **asked.given()}
    return ReadOptions.model_validate(options) if options else None


def folder_of(out: Path) -> Path:
    """The folder of parts beside an unfinished output."""
    return out.with_name(out.name + ".parts")


def result_name(inputs: Sequence[Path]) -> Path:
    """The default output: `<input>.predictions.parquet` in the working directory."""
    first = inputs[0]
    stem = file_stem(first) if len(inputs) == 1 else first.parent.name or "inputs"
    return Path(f"{stem}.predictions.parquet").absolute()


def plan_of(
    run: RunDir | None,
    model: Path,
    inputs: Sequence[Path],
    site: Site,
    *,
    gpus: int | None = None,
    time_min: int | None = None,
) -> Plan:
    """The plan of a prediction: the run's, or one that names a plain folder; on one node with at most one GPU.

    Raises:
        InputError: a number that cannot be asked for.
    """
    data = Data.model_validate({"files": {"all": "-"}, "text": "text", "label": "label"})
    recipe = run.plan().recipe if run else Recipe(name="model", model=str(model), data=data)
    resources_of_run = recipe.resources
    gpus = min(1, resources_of_run.gpus_per_node) if gpus is None else gpus
    changes = {"nodes": 1, "gpus_per_node": gpus, **({"time": time_min} if time_min else {})}
    try:
        resources = Resources.model_validate({**resources_of_run.model_dump(), **changes})
    except ValidationError as error:
        raise InputError(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}", "correct the number") from None
    recipe = recipe.model_copy(update={"resources": resources, "name": f"predict-{recipe.name}"[:100]})
    # The global batch of training means nothing here: one process takes it all.
    return Plan(
        afina_version=__version__,
        recipe=recipe,
        site=site,
        geometry=geometry_for(recipe, 1),
        files={"all": tuple(path for path in inputs if path != STDIN)},
        model_folder=model,
    )
