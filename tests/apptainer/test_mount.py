"""slurm/node.sh: the image's file system outlives the signals of the cluster, and leaves nothing on the node.

The real image, mounted by an ordinary user. The tests send Slurm's signals themselves, to the processes that it would
reach; tests/slurm/test_signals.py lets Slurm do it. Not covered: a setuid Apptainer but for being refused.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.common import NASTY, ROOT, program
from tests.processes import alive, descendants, signal_all, wait_until

#: The worker: answers each line of its standard input with a line of JSON.
WORKER = """
import json, os, signal, sys
received = set()
for name in ("TERM", "USR1", "USR2", "INT", "HUP"):
    signal.signal(getattr(signal, "SIG" + name), lambda number, frame: received.add(signal.Signals(number).name[3:]))
def answer(**fields):
    print(json.dumps(fields), flush=True)
answer(root=os.environ["APPTAINER_CONTAINER"])
while line := sys.stdin.readline():
    word, _, rest = line.strip().partition(" ")
    if word == "received":
        answer(received=sorted(received))
    elif word == "import":
        try:
            import importlib
            importlib.import_module(rest)
            file = __import__("sysconfig").get_path("purelib") + "/torch/version.py"
            answer(ok=True, read=len(open(file, "rb").read()) == os.path.getsize(file) > 0)
        except Exception as error:
            answer(ok=False, error=repr(error))
    elif word == "exit":
        sys.exit(int(rest))
"""


def _account() -> pwd.struct_passwd:
    if os.geteuid():
        return pwd.getpwuid(os.geteuid())
    return pwd.getpwnam(os.environ.get("AFINA_TEST_USER", "researcher"))


class Worker:
    """A running node.sh with WORKER in the image."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdin is not None and process.stdout is not None
        self.root = Path(self.answer()["root"])

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise EOFError(f"the worker ended with {self.process.wait(30)}: {self.process.stderr.read()}")  # type: ignore[union-attr]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, line: str) -> dict[str, Any]:
        print(line, file=self.process.stdin, flush=True)
        return self.answer()

    def receives(self, *names: str) -> None:
        wait_until(lambda: set(names) <= set(self.ask("received")["received"]))

    def ends(self, code: int) -> int:
        print(f"exit {code}", file=self.process.stdin, flush=True)
        return self.process.wait(30)


class Node:
    """A node of the ordinary user: node.sh in a folder that he can read, a TMPDIR of his own."""

    def __init__(self, home: Path, image: Path, temporary: str) -> None:
        self.home, self.image, self.tmp = home, image, home / temporary
        self.script = home / "node.sh"
        self.bin = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        self.started: list[subprocess.Popen[str]] = []
        shutil.copy(ROOT / "slurm/node.sh", self.script)
        self.tmp.mkdir()
        account = _account()
        if os.geteuid() == 0:
            for path in (self.script, self.tmp):
                shutil.chown(path, account.pw_uid, account.pw_gid)

    def popen(self, argv: list[str], *, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        account = _account()
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        process = subprocess.Popen(
            [*prefix, *argv],
            env={"PATH": self.bin, "HOME": str(self.home), "TMPDIR": str(self.tmp), "LC_ALL": "C.UTF-8"},
            cwd=self.home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **({} if prefix else user),  # type: ignore[arg-type]
        )
        self.started.append(process)
        return process

    def run(
        self, *command: str, image: Path | None = None, prefix: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """node.sh IMAGE COMMAND… to its end."""
        argv = ["bash", str(self.script), str(image or self.image), *command]
        with self.popen(argv, prefix=prefix) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def inside(self, *command: str, image: Path | None = None) -> list[str]:
        return ["apptainer", "--quiet", "exec", "--no-home", str(image or self.image), *command]

    def worker(self, *, plain: bool = False) -> Worker:
        """A worker that has answered; the watcher, which bash starts beside it, has left the tree."""
        command = self.inside("python", "-c", WORKER)
        if plain:
            return Worker(self.popen(command))
        made = Worker(self.popen(["bash", str(self.script), str(self.image), *command]))
        wait_until(lambda: len(self.outside(made)) >= 2)
        return made

    def mounts(self) -> list[Path]:
        """Mount points below TMPDIR."""
        points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        plain = [p.encode("latin-1", "replace").decode("unicode_escape") for p in points if "\\" in p]
        found = [Path(p.encode("latin-1", "ignore").decode(errors="replace")) for p in plain]
        return [p for p in [*found, *map(Path, points)] if p.is_relative_to(self.tmp)]

    def stat_error(self, path: Path) -> str:
        """The error of `stat` as the user, if any; root cannot access a user's mount."""
        with self.popen(["stat", "--", str(path)]) as process:
            return process.communicate(timeout=30)[1]

    def holders(self, root: Path) -> list[int]:
        """The processes outside the tree: the mount's and the watcher's."""
        words = (str(root).encode(), str(root.parent).encode())
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                given = file.read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0] in given or (b"afina-watch" in given and words[1] in given):
                found.append(int(file.parent.name))
        return found

    def outside(self, worker: Worker) -> list[int]:
        """The processes of a worker's mount that SIGKILL to its step does not reach under proctrack/linuxproc."""
        tree = (worker.process.pid, *descendants(worker.process.pid))
        return [pid for pid in self.holders(worker.root) if pid not in tree]

    def clean(self) -> bool:
        return not self.mounts() and list(self.tmp.iterdir()) == []


@pytest.fixture
def node(home: Path, image: Path) -> Iterator[Node]:
    yield from _node(home, image, 'tmp "of" it\'s $(touch pwned)')


def _node(home: Path, image: Path, temporary: str) -> Iterator[Node]:
    made = Node(home, image, temporary)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what tests under nohup start would ignore it too
    yield made
    signal.signal(signal.SIGHUP, before)
    for process in made.started:
        if process.poll() is None:
            signal_all([process.pid, *descendants(process.pid)], signal.SIGKILL)
        process.communicate()
    wait_until(lambda: made.clean())
    assert not list(home.glob("**/pwned"))


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2"])
def test_a_signal_to_the_whole_step_leaves_the_files(node: Node, name: str) -> None:
    worker = node.worker()
    assert worker.root.is_relative_to(node.tmp) and node.mounts() == [worker.root]
    for _ in range(3):
        signal_all([worker.process.pid, *descendants(worker.process.pid)], signal.Signals[f"SIG{name}"])
    worker.receives(name)
    assert worker.ask("import sqlite3") == {"ok": True, "read": True}
    assert worker.ask("import sklearn.metrics") == {"ok": True, "read": True}
    assert worker.ends(75) == 75
    assert node.clean()


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2"])
def test_without_node_sh_the_files_are_gone(node: Node, name: str) -> None:
    """The control: Apptainer's own mount, the same signal. The mount's process takes a moment to end."""
    worker = node.worker(plain=True)
    tree = descendants(worker.process.pid)
    mounting = [pid for pid in tree if b"squashfuse" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert mounting
    signal_all([worker.process.pid, *tree], signal.Signals[f"SIG{name}"])
    wait_until(lambda: not any(map(alive, mounting)))
    try:
        worker.receives(name)
        answer = worker.ask("import sqlite3")
    except (EOFError, BrokenPipeError):
        return
    assert answer["ok"] is False, answer


def test_a_signal_to_node_sh_alone_is_passed_on(node: Node) -> None:
    """As under proctrack/cgroup, which signals only node.sh. Sent until it arrives: Apptainer's process, which passes it on, has room for two signals,
    those of Go's scheduler among them, and drops what comes beyond; a stop does not depend on it, for job.sh leaves a file too."""
    worker = node.worker()

    def sent(name: str) -> bool:
        os.kill(worker.process.pid, signal.Signals[f"SIG{name}"])
        time.sleep(0.5)
        return name in worker.ask("received")["received"]

    for name in ("USR1", "TERM", "USR2", "INT", "HUP"):
        wait_until(partial(sent, name))
    assert worker.ends(0) == 0


def test_killed_as_a_whole_the_mount_goes_too(node: Node) -> None:
    """All that descends from the step: what SIGKILL reaches under proctrack/linuxproc."""
    worker = node.worker()
    signal_all([worker.process.pid, *descendants(worker.process.pid)], signal.SIGKILL)
    wait_until(node.clean)


def test_node_sh_killed_alone_the_worker_keeps_its_files(node: Node) -> None:
    worker = node.worker()
    below = descendants(worker.process.pid)
    os.kill(worker.process.pid, signal.SIGKILL)
    assert worker.ask("import sqlite3") == {"ok": True, "read": True}
    signal_all(below, signal.SIGKILL)
    wait_until(node.clean)


def test_a_dead_mount_point_is_cleared_by_the_next_start(node: Node) -> None:
    """SIGKILL under proctrack/cgroup takes the mount and the watcher too. A mount that lives is left alone."""
    living, killed = node.worker(), node.worker()
    signal_all([*node.outside(killed), killed.process.pid, *descendants(killed.process.pid)], signal.SIGKILL)

    wait_until(lambda: "not connected" in node.stat_error(killed.root))
    assert killed.root in node.mounts() and node.stat_error(living.root) == ""
    done = node.run(*node.inside("true"))
    assert done.returncode == 0 and done.stderr.count("cleared the dead mount point") == 1, done.stderr
    assert node.mounts() == [living.root] and not killed.root.parent.exists()
    assert living.ask("import sqlite3") == {"ok": True, "read": True}
    assert living.ends(0) == 0


def test_a_mount_that_hangs_is_left_alone(node: Node) -> None:
    worker = node.worker()
    outside = node.outside(worker)
    signal_all(outside, signal.SIGSTOP)
    done = node.run(*node.inside("true"))
    signal_all(outside, signal.SIGCONT)
    assert (done.returncode, done.stderr) == (0, "") and node.mounts() == [worker.root]
    assert worker.ask("import sqlite3") == {"ok": True, "read": True}
    assert worker.ends(0) == 0


def test_two_at_once_do_not_meet(node: Node) -> None:
    first, second = node.worker(), node.worker()
    assert first.root != second.root and len(node.mounts()) == 2
    assert first.ends(3) == 3
    assert node.mounts() == [second.root]
    assert second.ask("import sqlite3") == {"ok": True, "read": True}
    assert second.ends(4) == 4


# -- exit codes, words, paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 42, 75, 255])
def test_the_exit_code_is_the_commands(node: Node, code: int) -> None:
    done = node.run(*node.inside("sh", "-c", f"echo out; echo err >&2; exit {code}"))
    assert (done.returncode, done.stdout, done.stderr) == (code, "out\n", "err\n")
    assert node.clean()


def test_death_by_a_signal_has_the_exit_code_of_a_shell(node: Node) -> None:
    done = node.run(*node.inside("python", "-c", "import os; os.kill(os.getpid(), 9)"))
    assert (done.returncode, done.stderr) == (137, "")


def test_words_arrive_as_they_are(node: Node) -> None:
    words = [*NASTY, "", str(node.image) + "x"]
    done = node.run(*node.inside("python", "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *words))
    assert json.loads(done.stdout) == words, done.stderr


@pytest.mark.parametrize("name", NASTY)
def test_nasty_paths(home: Path, image: Path, name: str) -> None:
    """TMPDIR and image by the same nasty name."""
    for node in _node(home, image, name):
        link = home / f"{name}.sif"
        link.symlink_to(image)
        done = node.run(*node.inside("printenv", "APPTAINER_CONTAINER", image=link), image=link)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout[:-1]).is_relative_to(node.tmp) and done.stderr == ""
        assert node.clean()


# -- where it cannot be done -------------------------------------------------------------------------------------------

#: An Apptainer that prints the command to run, and passes everything else to the real one.
FAKE = """case $1 in
  buildcfg) if [ -e "$HOME/setuid" ]; then echo APPTAINER_SUID_INSTALL=1; else exec {real} "$@"; fi ;;
  sif) exec {real} "$@" ;;
  *) printf '%s\\n' "$@"; exit 7 ;;
esac
"""


def _programs(node: Node, *without: str) -> None:
    """A PATH with the programs that node.sh calls, except `without`, and the fake Apptainer."""
    folder = node.home / "bin"
    folder.mkdir()
    names = "bash mkdir mktemp rm rmdir setsid squashfuse squashfuse_ll fusermount fusermount3 stat timeout tr"
    for name in names.split():
        if name not in without and (found := shutil.which(name)):
            (folder / name).symlink_to(found)
    program(folder, "apptainer", FAKE.replace("{real}", str(shutil.which("apptainer"))))
    node.bin = str(folder)


def _mounted_by_apptainer(node: Node, why: str, image: Path | None = None, **more: Any) -> None:
    done = node.run("apptainer", "exec", str(image or node.image), "a b", image=image, **more)
    assert done.returncode == 7 and done.stdout == f"exec\n{image or node.image}\na b\n", done
    (line,) = done.stderr.splitlines()
    assert line.startswith("afina: apptainer mounts the image itself") and why in line


@pytest.mark.parametrize(
    ("without", "why"),
    [
        (("squashfuse", "squashfuse_ll"), "no squashfuse"),
        (("fusermount", "fusermount3"), "no fusermount"),
        (("setsid",), "squashfuse_ll failed: "),
    ],
)
def test_a_missing_program_is_reported(node: Node, without: tuple[str, ...], why: str) -> None:
    _programs(node, *without)
    _mounted_by_apptainer(node, why)
    assert node.clean()


def test_a_setuid_apptainer_mounts_by_itself(node: Node) -> None:
    _programs(node)
    (node.home / "setuid").touch()
    _mounted_by_apptainer(node, "installed setuid")


def test_a_folder_is_used_as_it_is(node: Node) -> None:
    _programs(node)
    _mounted_by_apptainer(node, "not a file", node.home)


def test_an_image_without_a_file_system(node: Node) -> None:
    empty = node.home / "empty.sif"
    subprocess.run(["apptainer", "sif", "new", str(empty)], check=True, capture_output=True)
    empty.chmod(0o644)
    _programs(node)
    _mounted_by_apptainer(node, "no squashfs partition", empty)


def test_a_mount_that_fails(node: Node) -> None:
    cut = node.home / "cut.sif"
    with node.image.open("rb") as whole:
        cut.write_bytes(whole.read(1_000_000))
    cut.chmod(0o644)
    _programs(node)
    _mounted_by_apptainer(node, "squashfuse_ll failed: ", cut)
    assert node.clean()


def test_no_room_for_the_mount_point(node: Node) -> None:
    _programs(node)
    node.tmp.rmdir()
    _mounted_by_apptainer(node, "cannot write in")
    node.tmp.mkdir()


def test_no_fuse_device(node: Node) -> None:
    if os.geteuid():
        pytest.skip("needs root, to hide /dev/fuse in a mount namespace")
    hidden = node.home / "closed"
    hidden.touch(mode=0o600)
    _programs(node)
    script = 'PATH=/usr/sbin:/usr/bin:/sbin:/bin; mount --bind "$1" /dev/fuse; shift; exec runuser -u "$@"'
    hide = [str(shutil.which("unshare")), "--mount", "/bin/sh", "-euc", script, "sh", str(hidden)]
    prefix = (*hide, _account().pw_name, "--", "/usr/bin/env", f"PATH={node.bin}")
    _mounted_by_apptainer(node, "/dev/fuse", prefix=prefix)


def test_no_apptainer_is_an_error_with_a_remedy(node: Node) -> None:
    _programs(node)
    (node.home / "bin/apptainer").unlink()
    done = node.run("apptainer", "exec", str(node.image), "true")
    assert done.returncode == 3 and "apptainer is not on PATH" in done.stderr and "remedy:" in done.stderr
