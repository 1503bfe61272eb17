"""The prepared folder: written by hand here, read through the public functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from afina.errors import SiteError
from afina.publish import publish, staging
from afina.worker.data import prepared


def write_part(folder: Path, part: str, rows: list[list[int]], labels: np.ndarray, types: bool = False) -> None:
    flat = np.array([i for row in rows for i in row], np.uint16)
    with prepared.ArrayWriter(folder / f"{part}.tokens.npy", np.uint16) as tokens:
        for row in rows:
            tokens.append(np.array(row))
    np.save(folder / f"{part}.offsets.npy", np.cumsum([0, *map(len, rows)]).astype(np.int64))
    np.save(folder / f"{part}.labels.npy", labels)
    if types:
        np.save(folder / f"{part}.types.npy", (flat % 2).astype(np.uint8))


@pytest.fixture
def final(tmp_path: Path) -> Path:
    """A published folder, its name a nasty one."""
    final = tmp_path / 'it\'s a "store", ünï' / "abc123"
    with staging(final) as aside:
        write_part(aside, "train", [[5, 6, 7], [8], [9, 65535]], np.array([0, 1, 0]), types=True)
        write_part(aside, "eval", [[1]], np.array([1]))
        (aside / "tokenizer").mkdir()
        (aside / "tokenizer" / "tokenizer.json").write_text("{}")
        prepared.seal(aside, {"digest": "abc123", "labels": ["één", "twee, drie"]})
        assert publish(aside, final, prepared.is_whole)
    return final


def test_what_was_written_is_read(final: Path) -> None:
    split = prepared.open_split(final, "train")
    assert len(split) == 3
    assert split.lengths.tolist() == [3, 1, 2]
    assert split.tokens.dtype == np.uint16
    assert split.tokens[split.offsets[2] : split.offsets[3]].tolist() == [9, 65535]
    assert split.types is not None and split.types.tolist() == [1, 0, 1, 0, 1, 1]
    assert prepared.open_split(final, "eval").types is None
    manifest = prepared.verify(final)
    assert manifest["labels"] == ["één", "twee, drie"]
    assert set(manifest["files"]) == {p.relative_to(final).as_posix() for p in final.rglob("*") if p.is_file()} - {
        "manifest.json"
    }


def test_arrays_are_memory_mapped_and_read_only(final: Path) -> None:
    split = prepared.open_split(final, "train")
    assert isinstance(split.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        split.tokens[0] = 1


def test_a_long_array_is_the_one_numpy_would_write(tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(0, 1 << 32, 100_003, dtype=np.uint32)
    with prepared.ArrayWriter(tmp_path / "a.npy", np.uint32) as writer:
        for start in range(0, len(values), 997):
            writer.append(values[start : start + 997])
    np.save(tmp_path / "b.npy", values)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


@pytest.mark.parametrize("name", ["train.tokens.npy", "tokenizer/tokenizer.json", "manifest.json"])
def test_a_missing_file_is_named(final: Path, name: str) -> None:
    (final / name).unlink()
    with pytest.raises(SiteError) as error:
        prepared.verify(final, digests=False)
    assert str(final / name) in error.value.message
    assert "afina prefetch RECIPE" in error.value.remedy


def test_a_truncated_file_is_named_without_reading_it(final: Path) -> None:
    path = final / "train.tokens.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SiteError, match=r"train\.tokens\.npy.*bytes"):
        prepared.verify(final, digests=False)


def test_an_altered_file_is_found_by_its_digest_only(final: Path) -> None:
    path = final / "train.labels.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    prepared.verify(final, digests=False)
    with pytest.raises(SiteError, match=r"train\.labels\.npy.*differs"):
        prepared.verify(final)


def test_arrays_that_do_not_fit_are_refused(final: Path) -> None:
    np.save(final / "eval.offsets.npy", np.array([0, 1, 2]))
    with pytest.raises(SiteError, match="do not fit"):
        prepared.open_split(final, "eval")
    (final / "eval.labels.npy").unlink()
    with pytest.raises(SiteError, match=r"eval\.labels\.npy: is missing"):
        prepared.open_split(final, "eval")


def test_another_format_is_refused(final: Path) -> None:
    manifest = json.loads((final / "manifest.json").read_text())
    (final / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(SiteError, match="format 99, this afina reads 1"):
        prepared.load_manifest(final)


def test_an_altered_manifest_is_named(final: Path) -> None:
    path = final / "manifest.json"
    path.write_text(path.read_text().replace("twee, drie", "twee, vier"))
    with pytest.raises(SiteError, match=r"manifest\.json: its content differs"):
        prepared.load_manifest(final)
    assert not prepared.is_whole(final)


def test_reading_imports_no_torch() -> None:
    code = (
        "import sys, afina.worker.data.prepared, afina.worker.data.tables.data_table;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
