"""The advisory lock, and publishing by rename: with real processes that hold, wait, die and interfere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from afina import publish as publishing
from afina.processes import Process, advisory_lock
from afina.publish import publish, staging, sweep

#: Read before the test environment forgets it.
KILLS = int(os.environ.get("AFINA_TEST_KILLS", "10"))

HOLD = """
import pathlib, sys
from afina.processes import advisory_lock
with advisory_lock(pathlib.Path(sys.argv[1]), "preparing reviews", lambda line: print(line, flush=True)):
    print("held", flush=True)
    sys.stdin.readline()
"""


class Child:
    """A Python process that reads and writes lines."""

    def __init__(self, code: str, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def proceed(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "it's a place"
    folder.mkdir()
    return folder


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(code: str, *arguments: str | Path) -> Child:
        children.append(Child(code, *arguments))
        return children[-1]

    yield start
    for one in children:
        one.end()


# -- lock -------------------------------------------------------------------------------------------------------------


def test_the_second_waits_names_the_holder_once_and_follows(child: Callable[..., Child], place: Path) -> None:
    path = place / "it's a lock"
    first = child(HOLD, path)
    assert first.line() == "held"
    second = child(HOLD, path)
    message = second.line()
    year = time.strftime("%Y-")
    assert message.startswith(
        f"waiting: process {first.process.pid} on {socket.gethostname()} has been preparing reviews"
    )
    assert f"since {year}" in message
    first.proceed()
    assert second.line() == "held", "named more than once"
    second.proceed()
    assert second.process.wait(timeout=60) == 0 and not path.exists()


def test_a_killed_holder_is_not_waited_for(child: Callable[..., Child], place: Path) -> None:
    path = place / "lock"
    first = child(HOLD, path)
    assert first.line() == "held"
    first.process.kill()  # not waited for: what is left is a zombie, as under a parent that does not care
    messages: list[str] = []
    with advisory_lock(path, "preparing", messages.append):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists() and list(place.glob("lock*")) == []


def elsewhere(path: Path, **changes: object) -> None:
    holder = {**asdict(Process.current()), "host": "node-7", "since": 1, "what": "x", **changes}
    path.write_text(json.dumps(holder))


@pytest.mark.parametrize("content", ["another node", "nothing", "nonsense"])
def test_a_holder_elsewhere_without_heartbeat_is_not_waited_for(place: Path, content: str) -> None:
    path = place / "lock"
    if content == "another node":
        elsewhere(path)
    else:
        path.write_text("" if content == "nothing" else '{"host": 5')
    messages: list[str] = []
    with advisory_lock(path, "preparing", messages.append, patience_s=0.3):
        assert json.loads(path.read_text())["host"] == socket.gethostname()
    assert len(messages) == (content == "another node")
    assert not path.exists()


def test_a_holder_elsewhere_with_a_heartbeat_is_waited_for(child: Callable[..., Child], place: Path) -> None:
    path, patience = place / "lock", 3.0
    elsewhere(path)
    waiter = child(HOLD.replace("flush=True)):", f"flush=True), patience_s={patience}):"), path)
    assert "on node-7" in waiter.line()
    began = beaten = time.monotonic()
    longest = 0.0
    while beaten - began < 2 * patience:
        os.utime(path)
        time.sleep(0.1)
        longest, beaten = max(longest, time.monotonic() - beaten), time.monotonic()
    if longest < patience / 2:  # a machine too busy to beat proves nothing
        assert json.loads(path.read_text())["host"] == "node-7"
    path.unlink(missing_ok=True)
    assert waiter.line() == "held"


def test_holders_do_not_overlap(place: Path) -> None:
    code = """
import pathlib, sys
from afina.processes import advisory_lock
here = pathlib.Path(sys.argv[1])
for _ in range(25):
    with advisory_lock(here / "lock", "counting", lambda line: None):
        (here / "count").write_text(str(int((here / "count").read_text()) + 1))
"""
    (place / "count").write_text("0")
    counting = [subprocess.Popen([sys.executable, "-c", code, str(place)]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in counting] == [0] * 4
    assert (place / "count").read_text() == "100"
    assert [p.name for p in place.glob("lock*")] == []


def test_a_lost_lock_is_not_released_for_its_next_holder(place: Path) -> None:
    path = place / "lock"
    with advisory_lock(path, "preparing", lambda line: None):
        path.unlink()
        elsewhere(path)
    assert json.loads(path.read_text())["host"] == "node-7"


def test_dead_and_living_processes() -> None:
    here = Process.current()
    assert here.is_dead() is False
    assert Process.parse(str(here)) == here and Process.parse("half") is None
    assert Process.parse(str(replace(here, host="a-b-7-c"))) == replace(here, host="a-b-7-c")
    assert replace(here, started=here.started + 1).is_dead() is True, "the same number, another process"
    assert replace(here, host="elsewhere").is_dead() is None
    assert replace(here, space=here.space + 1).is_dead() is None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        theirs = replace(here, pid=process.pid, started=started)
        assert theirs.is_dead() is False
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert theirs.is_dead() is True, "a zombie"
        process.wait()
        assert theirs.is_dead() is True


# -- publishing -------------------------------------------------------------------------------------------------------


def whole(folder: Path) -> bool:
    return (folder / "good").exists()


def make(final: Path, name: str = "good") -> bool:
    with staging(final) as aside:
        (aside / name).write_text(name)
        return publish(aside, final, whole)


def test_the_first_to_publish_wins(place: Path) -> None:
    final = place / "abc"
    assert make(final)
    number = final.stat().st_ino
    assert not make(final) and final.stat().st_ino == number
    assert [p.name for p in place.iterdir() if p.name.startswith(".")] == []


def test_a_damaged_folder_is_replaced_and_its_readers_keep_it(place: Path) -> None:
    final = place / "abc"
    final.mkdir()
    np.save(final / "old.npy", np.arange(5))
    mapped = np.load(final / "old.npy", mmap_mode="r")
    assert make(final)
    assert [p.name for p in final.iterdir()] == ["good"]
    assert mapped.tolist() == [0, 1, 2, 3, 4] and (place / ".damaged-abc-1/old.npy").exists()
    (final / "good").unlink()
    (final / "bad").touch()
    assert make(final) and (place / ".damaged-abc-2").is_dir()


def test_a_good_folder_that_came_meanwhile_is_never_set_aside(place: Path) -> None:
    final, other = place / "abc", place / "other"
    for folder, name in ((final, "bad"), (other, "good")):
        folder.mkdir()
        (folder / name).touch()
    asked: list[Path] = []

    def meanwhile(folder: Path) -> bool:
        asked.append(folder)
        if len(asked) == 1:
            # Between our look and our rename another process mends it.
            final.rename(place / "gone")
            other.rename(final)
            return False
        return whole(folder)

    number = other.stat().st_ino
    with staging(final) as aside:
        (aside / "good").touch()
        assert not publish(aside, final, meanwhile)
    assert final.stat().st_ino == number and len(asked) == 2


def test_staging_is_removed_on_failure(place: Path) -> None:
    with pytest.raises(RuntimeError), staging(place / "x") as aside:
        (aside / "half").write_text("half")
        raise RuntimeError
    assert not list(place.iterdir())


def test_litter_is_removed_when_its_owner_is_dead_and_not_before(child: Callable[..., Child], place: Path) -> None:
    code = """
import pathlib, sys
from afina.publish import staging
with staging(pathlib.Path(sys.argv[1])) as aside:
    (aside / "half").write_text("x"); print(aside, flush=True); sys.stdin.readline()
"""
    dead, alive = child(code, place / "dead"), child(code, place / "alive")
    left, used = Path(dead.line()), Path(alive.line())
    dead.process.kill()
    dead.process.wait()
    foreign = {name: place / f".staging-{name}-node-7-0-1-1" for name in ("fresh", "stale")}
    aside = {name: place / f".{name}.json.17.0123abcd" for name in ("fresh", "stale")}
    locks = {name: place / f".turn-{name}" for name in ("fresh", "stale")}
    damaged = {name: place / f".damaged-{name}-1" for name in ("fresh", "stale")}
    for group in (foreign, damaged):
        for path in group.values():
            path.mkdir()
            (path / "half").touch()
    for group in (aside, locks):
        for path in group.values():
            path.touch()
    now = time.time()
    for path in (foreign["stale"], aside["stale"], locks["stale"]):
        os.utime(path, (now, now - publishing.LITTER_S - 60))
    os.utime(damaged["stale"], (now, now - publishing.DAMAGED_S - 60))
    (place / ".somebody's own").touch()
    os.utime(place / ".somebody's own", (0, 0))
    sweep(place, now=now)
    groups = (foreign, aside, locks, damaged)
    expected = {used.name, ".somebody's own", *(group["fresh"].name for group in groups)}
    assert {p.name for p in place.iterdir()} == expected and not left.exists()


PUBLISH = """
import pathlib, sys
from afina.publish import publish, staging
final = pathlib.Path(sys.argv[1])
def whole(folder):
    return all((folder / str(i)).exists() for i in range(20))
print("go", flush=True)
while True:
    with staging(final) as aside:
        for i in range(20):
            (aside / str(i)).touch()
        publish(aside, final, whole)
"""


def test_killed_at_any_instant_there_is_all_or_nothing(child: Callable[..., Child], place: Path) -> None:
    """Two that publish the same, over and over, and are killed; a reader never sees a part, nothing is left behind."""
    final = place / "abc"
    for _ in range(KILLS):
        pair = [child(PUBLISH, final) for _ in range(2)]
        assert [one.line() for one in pair] == ["go", "go"]
        while not final.exists():
            pass
        for one in pair:
            # What is seen was there whole: it is moved away first, for it may be set aside while it is looked at.
            with contextlib.suppress(FileNotFoundError):
                seen = final.rename(place / "seen")
                assert sorted(int(p.name) for p in seen.iterdir()) == list(range(20))
                shutil.rmtree(seen)
            one.process.send_signal(signal.SIGKILL)
            one.process.wait()
    shutil.rmtree(final, ignore_errors=True)
    assert make(final)
    assert [p.name for p in place.iterdir()] == ["abc"]
