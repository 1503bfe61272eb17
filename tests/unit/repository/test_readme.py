"""The README's commands for a workstation, run as it spells them, and its output held against theirs.

`pip install` and the demo are run by CI (`make demo`), the commands for a cluster by tests/slurm/test_start.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.common import readme_block
from tests.tiny import tiny_model, tiny_reviews, write_csv


def _run(lines: list[str], folder: Path) -> str:
    env = {
        "HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }
    script = "\n".join(["set -euo pipefail", *lines])
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _matches(promised: str, lines: list[str]) -> bool:
    """Whether a line is the promised one, but for numbers, paths and the widths of columns."""
    parts = [re.escape(part) for part in re.split(r"[\d.,]*\d|\S*/\S+|…", " ".join(promised.split()))]
    return any(re.fullmatch(r"\S*".join(parts), " ".join(line.split())) for line in lines)


@pytest.mark.series
def test_the_commands_for_a_workstation_do_what_the_readme_shows(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    (folder / "home").mkdir(parents=True)
    # Unequal classes, as in the README's reviews: macro F1 chooses the checkpoint and comes first.
    rows = tiny_reviews(120) + [row for row in tiny_reviews(300, seed=2) if row["stars"] == 1]
    write_csv(folder / "reviews.csv", rows)
    tiny_model(folder / "minilm")

    first = readme_block("console")
    commands = [line.removeprefix("$ ") for line in first if line.startswith("$ ")]
    assert len(commands) == 3
    output = _run(commands, folder).splitlines()
    promised = [line for line in first if not line.startswith("$ ") and line.strip(" …-")]
    assert len(promised) >= 5
    assert [line for line in promised if not _matches(line, output)] == [], "\n".join(output)

    (run,) = (folder / "stars/scratch/runs").iterdir()
    write_csv(folder / "stars/new.csv", tiny_reviews(10, seed=1))
    own = [line.partition("#")[0] for line in readme_block("sh", "With your own texts")]
    assert [line.split()[:2] for line in own[:3]] == [["afina", "init"], ["cd", "stars"], ["afina", "train"]]
    # The first three were run above; the recipe with a model from the Hub needs the internet.
    _run([re.sub(r"\bRUN\b", run.name, line) for line in own[3:]], folder / "stars")
    assert (folder / "stars/new.predictions.parquet").is_file()
    assert (folder / "stars/model-to-give-away/README.md").is_file()


def test_another_output_than_the_promised_is_noticed() -> None:
    assert _matches("3  0.68  0.737", ["epoch loss", "  3   0.123456  1.5"])
    assert not _matches("afina: finished: 117 steps", ["afina: stopped: 117 steps"])
