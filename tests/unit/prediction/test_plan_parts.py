"""Predictions that are refused before anything is computed, and a dry run."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.unit.conftest import Ran, tree
from tests.unit.prediction.conftest import here, planned

from afina.errors import AfinaError, InputError
from afina.prediction import jobs as predicting
from afina.prediction.request import Prediction
from afina.worker.predicting import plan_parts, predict_parts

# -- killed and resumed ------------------------------------------------------------------------------------------------


def test_a_difference_is_refused_by_name(run: Path, reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    about = planned(run, reviews, out, chunk_rows=50)
    before = tree(Path(about["parts"]))
    with pytest.raises(InputError, match=r"chunk_rows was 50, is 60.*") as refused:
        planned(run, reviews, out, chunk_rows=60)
    assert "remove that folder" in refused.value.remedy
    other = Path(shutil.copy(reviews, tmp_path / "other.csv"))
    with pytest.raises(InputError, match=r"input other.csv was not there; input reviews.csv is not given"):
        planned(run, other, out, chunk_rows=50)
    another = shutil.copytree(run, tmp_path / "another run")
    weights = bytearray((another / "model/model.safetensors").read_bytes())
    weights[-5] ^= 1
    (another / "model/model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="the model is a different one"):
        planned(another, reviews, out, chunk_rows=50)
    text = reviews.read_text()
    reviews.write_text(text.replace("r7", "x7"))
    with pytest.raises(InputError, match=r"input reviews.csv has changed"):
        planned(run, reviews, out, chunk_rows=50)
    with pytest.raises(InputError, match=r"reviews.csv: its content differs"):
        predict_parts.run(about["parts"], 0, 1, and_merge=True, progress="log")
    assert tree(Path(about["parts"])) == before
    reviews.write_text(text)  # touched, and the same again
    here(run, reviews, out, chunk_rows=50)
    assert here(run, reviews, out, chunk_rows=50)["state"] == "whole"
    with pytest.raises(InputError, match=r"exists \(another prediction: keep was \"all\", is \"id\"\)"):
        here(run, reviews, out, chunk_rows=50, keep="id")
    (tmp_path / "mine.csv").write_text("a\n1\n")
    with pytest.raises(InputError, match="exists; nothing that exists is overwritten"):
        here(run, reviews, tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "a\n1\n"


# -- refused -----------------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[str, Callable[[Path], Any], dict[str, Any], str, str]] = {
    "no such column": ("a.csv", lambda p: p.write_text("texts,n\na,1\n"), {}, "no column `text`", "did you mean `texts`"),
    "other separator": ("a.csv", lambda p: p.write_text("text;n\na;1\n"), {}, "no column `text`", "separated by `;`: `data.delimiter"),
    "named column": ("a.csv", lambda p: p.write_text("text\na\n"), {"text": ["body"]}, "no column `body`", "--text"),
    "two columns": ("a.csv", lambda p: p.write_text("text,b\na,c\n"), {"text": ["text", "b"]}, "reads one text a row", "--text COLUMN"),
    "twice": ("a.csv", lambda p: p.write_text("text,n,text\na,1,2\n"), {}, "column `text` occurs twice", "rename"),
    "half a character": ("a.jsonl", lambda p: p.write_text('{"text": "a \\ud83d"}\n'), {}, "line 1: column `text` holds .ud83d", "cut in the middle"),
    "a column of the output": ("a.csv", lambda p: p.write_text("text,prediction\n" + "a,1\n" * 3000 + "ragged\n"), {}, "has a column `prediction`", "--keep id"),
    "an option of no use": ("a.jsonl", lambda p: p.write_text('{"text": "a"}'), {"reading": {"header": False}}, "--header: is for CSV and TSV files", "leave it out"),
    "a list": ("a.jsonl", lambda p: p.write_text('{"text": ["a"]}\n{"text": ["b", "c"]}\n'), {}, "line 1: column `text` holds a list, a text is expected", "--text"),
    "no Parquet": ("a.parquet", lambda p: p.write_bytes(b"PAR1 nonsense"), {}, "not a readable Parquet file", "write the file again"),
    "no rows": ("a.csv", lambda p: p.write_text("text\n"), {}, "no rows", "has rows"),
    "score taken": ("a.csv", lambda p: p.write_text("text,score: 3\na,b\n"), {}, "a column `score: 3`", "--keep id"),
    "unknown format": ("a.xlsx", lambda p: p.write_text("text"), {}, "format .xlsx is not known", ".csv"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_its_place_and_leaves_nothing(name: str, run: Path, tmp_path: Path) -> None:
    file, write, options, message, remedy = BAD[name]
    folder = tmp_path / "in put"
    folder.mkdir()
    write(folder / file)
    before = tree(folder)
    with pytest.raises(AfinaError, match=message) as refused:
        here(run, folder / file, folder / "out.parquet", **options)
    assert remedy in refused.value.remedy
    assert refused.value.exit_code == 2
    assert tree(folder) == before


def test_bad_bytes_in_parquet_are_found_before_the_model_is_loaded(run: Path, tmp_path: Path) -> None:
    good = pa.array([b"fine"] * 9000 + [b"\xff\xfe"] + [b"fine"] * 10, pa.binary())
    pq.write_table(
        pa.table({"text": pa.Array.from_buffers(pa.string(), len(good), good.buffers())}), tmp_path / "a.parquet"
    )
    with pytest.raises(AfinaError, match=r"a.parquet, row 9001: column `text` holds bytes that are not UTF-8"):
        plan_parts.plan(predicting.compose(run, [tmp_path / "a.parquet"], tmp_path / "o.parquet"))


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (["RUN", "missing.csv"], "missing.csv: no such file", "working directory"),
        (["RUN", "reviewz.csv"], "reviewz.csv: no such file", "did you mean `reviews.csv`?"),
        (["nowhere", "reviews.csv"], "nowhere: no such folder", "`afina list` names the runs"),
        (["model", "reviews.csv"], "is a BertModel, not a classifier", "train it first"),
        (["RUN", "reviews.csv", "-o", "reviews.csv"], "is an input", "another output"),
        (["RUN", "reviews.csv", "-o", "out.xlsx"], "format .xlsx is not known", ".jsonl"),
        (["RUN", "reviews.csv", "-o", "no/such/out.csv"], "there is no folder", "mkdir -p"),
        (["RUN", "-", "reviews.csv"], "standard input cannot be mixed", "alone"),
        (["RUN", "-"], "standard input is empty", "a text a line"),
        (["RUN", "reviews.csv", "--array", "3"], "--array is for a Slurm job", "--submit"),
        (["unfinished", "reviews.csv"], "this run has no model/ yet", "afina status"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_message_with_a_remedy(
    words: list[str],
    message: str,
    remedy: str,
    place: Path,
    reviews: Path,
    command: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unfinished = reviews.parent / "unfinished"
    shutil.copytree(place / "run", unfinished, ignore=shutil.ignore_patterns("model", "checkpoints"))
    (reviews.parent / "model").symlink_to(place / "model")
    before = tree(unfinished) | tree(reviews)
    monkeypatch.chdir(reviews.parent)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    done = command("predict", *(place / "run" if word == "RUN" else word for word in words))
    assert done.returncode == 2 and message in done.stderr and remedy in done.stderr, done
    assert tree(unfinished) | tree(reviews) == before
    assert not list(reviews.parent.glob("*.parts"))


# -- as Slurm jobs -----------------------------------------------------------------------------------------------------


def test_a_dry_run_is_what_is_done(run: Path, reviews: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    before = tree(tmp_path)
    done = command("predict", run, reviews, "-o", tmp_path / "o.csv", "--dry-run", "--submit", "--array", "2")
    assert done.returncode == 0, done.stderr
    shown, _, submission = done.stdout.partition("# would run\n")
    assert Prediction.model_validate_json(shown).out == tmp_path / "o.csv"
    assert submission.startswith("sbatch ") and "--array=0-1" in submission
    assert tree(tmp_path) == before
