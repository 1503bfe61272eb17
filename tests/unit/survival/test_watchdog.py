"""The watchdog, in processes that it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from afina.run.directory import RunDir

HANG = """
import sys, time
from afina.run.directory import RunDir
from afina.worker.survival.watchdog import Watchdog
dog = Watchdog(RunDir(sys.argv[1]), "1.0", 3, float(sys.argv[2]) / 60, lambda: None)
dog.start()
def where_it_hangs():
    for _ in range(int(sys.argv[3])):
        time.sleep(0.05); dog.beat("step 7")
    time.sleep(60)
where_it_hangs()
"""


def test_the_watchdog_ends_a_process_that_does_not_move(run: RunDir) -> None:
    argv = [sys.executable, "-c", HANG, str(run.path), "1", "40"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 4
    assert "where_it_hangs" in done.stderr, "the stack shows where"
    record = json.loads((run.attempts / "1.0/failed.rank3.json").read_text())
    assert record["cause"] == "stall" and "after step 7" in record["error"] and "remedy" in record["error"]


def test_the_watchdog_ends_a_process_whose_output_nobody_reads(run: RunDir) -> None:
    """`afina train … | head -1`: the pipe is full, and every write to it waits."""
    code = HANG.replace("where_it_hangs()\n", "sys.stderr.write('x' * 10**6)\n", 2).replace(
        "dog.start()", "Watchdog.WORDS_S = 2; dog.start()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run.path), "1", "0"], stderr=subprocess.PIPE)
    try:
        assert process.wait(timeout=40) == 4
        assert json.loads((run.attempts / "1.0/failed.rank3.json").read_text())["cause"] == "stall"
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_was_halted_itself_lives_on(run: RunDir) -> None:
    """`scontrol suspend` stops the watchdog too: time that did not pass for the process does not count."""
    process = subprocess.Popen([sys.executable, "-c", HANG, str(run.path), "2", "100000"], stderr=subprocess.PIPE)
    try:
        time.sleep(1.0)
        subprocess.run(["kill", "-STOP", str(process.pid)], check=True)
        time.sleep(8.0)
        subprocess.run(["kill", "-CONT", str(process.pid)], check=True)
        time.sleep(3.0)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
