"""Memory stays flat however large the data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.tiny import write_csv, write_jsonl

MEASURE = """
import pathlib, sys
from afina.recipe.keys.data_keys import Data
from afina.recipe.keys.train_keys import Tokens
from afina.worker.data.tokens import shards, tokenise, write_split
from afina.worker.data.tokens.encode import Encoder
from afina.worker.data.splits.build_splits import build_splits
from afina.worker.data.tables.data_table import DataSource

class Tokenizer:
    model_input_names = ("input_ids",)
    unk_token_id, all_special_ids = None, []
    def __call__(self, texts, **_):
        return {"input_ids": [[len(text), 1] for text in texts]}

shards.SHARD_BYTES = write_split._BLOCK_BYTES = 1 << 20
tokenise._BATCH_BYTES = 1 << 18
path = pathlib.Path(sys.argv[1])
source = DataSource((path,))
parts = {"train": {"fraction": 0.5}, "eval": {"fraction": 0.5, "sample": int(sys.argv[2])}}
data = Data.model_validate({"files": {"all": str(path)}, "text": "text", "label": "stars", **parts})
table = source.read(data.label, data.text)
labels, examples = build_splits("auto", data, {"all": table}, {"train": "all", "eval": "all"}, [])
checked = tokenise.CheckedData(labels, examples, [], {"all": source}, {"all": source.state()})
tokenising = tokenise.Tokenising(checked, data, Encoder(Tokenizer(), Tokens(max_length=32)), None, "uint16")
store = shards.ShardFolder(path.parent, "digest", {})
tokenising.make(store, print)
tokenising.write_splits(store, path.parent)
# Not ru_maxrss, which a process begins with what its parent had when it was started.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, suffix: str) -> None:
    """Reading, checking, tokenising (by a stand-in that costs nothing), a shuffled eval of half the rows: seven times the data
    in a fifth more memory, and less than half of what the texts have."""
    write = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_row_groups}[suffix]
    peaks = {}
    for rows in (4000, 30_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        path = folder / f"a.{suffix}"
        write(path, [{"text": f"good {i} {'z' * 3000}", "stars": i % 5} for i in range(rows)])
        argv = [sys.executable, "-c", MEASURE, str(path), str(rows // 2)]
        ran = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 0, ran.stderr
        peaks[rows] = int(ran.stdout.splitlines()[-1]) << 10
        assert len(pq.read_table(folder / "eval.rows.parquet")) == rows // 2
    grown, added = peaks[30_000] - peaks[4000], 26_000 * 3000
    assert grown < 0.5 * added, f"{grown / 2**20:.0f} MiB more for {added / 2**20:.0f} MiB of text"
    assert peaks[30_000] < 1.2 * peaks[4000], peaks


def write_row_groups(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500, use_dictionary=False)
