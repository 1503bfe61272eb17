"""A prepare that is killed resumes from its shards, and stops with its parent."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny import tiny_reviews, write_csv
from tests.unit.conftest import tree
from tests.unit.data.conftest import SEED
from tests.unit.data.stage import finished, leftovers, result, start

from afina.run.plan import Plan
from afina.worker.data.tokens import tokenise

#: Read before the test environment forgets them.
KILLS = max(1, int(os.environ.get("AFINA_TEST_KILLS", "8")) // 8)


@pytest.fixture
def plan(plan: Callable[..., Plan], tmp_path: Path) -> Plan:
    path = write_csv(tmp_path / "it's big.csv", tiny_reviews(12_000))
    splits = {"train": {"fraction": 0.8, "sample": 9000}, "eval": {"fraction": 0.2}}
    return plan(None, {"files": {"all": str(path)}, **splits}, tokens={"max_length": 24})


def shard_files(plan: Plan) -> list[Path]:
    return sorted(tokenise.shards_folder(plan).glob("*/*.npz"))


@pytest.mark.slow
def test_a_prepare_that_is_killed_repeatedly_gives_the_same_bytes(plan: Plan) -> None:
    print(f"AFINA_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    final = Path(result(finished(start(plan, RAYON_NUM_THREADS="1")))["prepared"])
    undisturbed = tree(final)
    assert shard_files(plan) == [] and list(tokenise.shards_folder(plan).iterdir()) == []
    shutil.rmtree(final)
    there = landed = 0
    for _ in range(5 * KILLS):
        process = start(plan, RAYON_NUM_THREADS=chance.choice("123"))
        wanted = there + chance.randint(1, 3)
        deadline = time.monotonic() + 100
        while len(shard_files(plan)) < wanted and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.01))
        process.kill()
        process.communicate(timeout=60)
        if final.exists():  # too late, on a busy machine: once more from the beginning
            shutil.rmtree(final)
        else:
            assert len(shard_files(plan)) >= wanted
            landed += 1
        there = len(shard_files(plan))
        if landed >= KILLS and there:
            break
    assert there, "every kill came too late"
    damaged = chance.choice(shard_files(plan))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    stamps = {path: path.stat().st_mtime_ns for path in shard_files(plan) if path != damaged}
    process = start(plan)
    seen: dict[Path, int] = {}
    while process.poll() is None and not final.exists():
        for path in stamps:
            with contextlib.suppress(FileNotFoundError):  # published, and the shards removed
                seen[path] = path.stat().st_mtime_ns
        time.sleep(0.001)
    ran = finished(process)
    resumed = re.search(r"resuming an interrupted prepare: ([\d,]+) of ([\d,]+) texts are tokenised", ran.stderr)
    assert result(ran)["reused"] is False and resumed, ran.stderr
    assert 0 < int(resumed[1].replace(",", "")) < int(resumed[2].replace(",", ""))
    assert seen == stamps, "an existing shard was made again"
    assert tree(final) == undisturbed
    assert leftovers(plan) == [final.name] and list(tokenise.shards_folder(plan).iterdir()) == []


@pytest.mark.slow
def test_it_stops_when_its_parent_is_killed(plan: Plan, tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, plan.to_json()], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 100
    while not shard_files(plan):
        assert time.monotonic() < deadline and Path(f"/proc/{pid}").exists()
        time.sleep(0.001)
    parent.kill()
    parent.communicate()
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline, "it runs on without a parent"
        time.sleep(0.05)
    assert leftovers(plan) == [] and shard_files(plan)


_SMALL = """
import sys
from afina.worker.__main__ import main
from afina.worker.data.tokens import shards, tokenise
shards.SHARD_BYTES, tokenise._BATCH_BYTES = 40_000, 10_000
sys.exit(main(["prepare"]))
"""


PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {_SMALL!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
child.stdin.write(sys.argv[1].encode())
child.stdin.close()
print(child.pid, flush=True)
child.stdout.read()
"""
