"""Where the seconds of a start go: from the command to the first step, with and without an image, and beside the tutorial's script.

    container     until a shell runs in the container: namespaces, and the mount
    interpreter   until Python's first line
    imports       torch, transformers and what a run of afina needs of them
    model         from_pretrained of the model, from shared storage
    group         a process group (gloo, one process)
    step          the first training step, on 8 texts of 128 tokens
    afina         a real run, from its start on the host to its `first_step`: checks, checkpoints and data included

Ways: `plain` (this environment), `image` (the file, mounted by Apptainer), `node.sh` (the file, mounted once as jobs do), `sandbox`
(unpacked on local disk), `kernel` (the file, mounted by the kernel, as a setuid Apptainer does; root), `gzip`, `zstd:3`, `lz4`, … (packed
again with that compression). --cold drops the page cache before each run (root).

    python tests/bench/startup.py --image afina.sif [--ways plain,image,sandbox,gzip,zstd:3] [--rounds 5] [--cold]
                                  [--model FOLDER] [--user NAME] [--json found.json]
    AFINA_TEST_DATA=FOLDER python tests/bench/startup.py --peers      `afina train` beside the tutorial's script, MiniLM, no image

With --peers both commands run once before they are measured, so that data is prepared (or cached); then in turn, medians and ranges.
Not covered: a shared file system, many nodes at once, GPUs (the start of CUDA is in none of the parts).
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import reviews  # type: ignore[import-not-found]
from measuring import AFINA, environment_of, ranged  # type: ignore[import-not-found]
from reviews import tiny

__all__ = ["PARTS", "main", "table"]

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("container", "interpreter", "imports", "model", "group", "step")

#: Prints the clock at each boundary.
PROBE = """
import time
clock = [time.time()]
import json, os, sys
import torch, transformers
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
import afina.worker.training.trainer
clock.append(time.time())
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=5, dtype=torch.float32)
clock.append(time.time())
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
clock.append(time.time())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
ids = torch.randint(5, model.config.vocab_size, (8, min(128, model.config.max_position_embeddings - 2)))
model.train()
model(input_ids=ids, labels=torch.zeros(8, dtype=torch.long)).loss.backward()
optimizer.step()
clock.append(time.time())
print(json.dumps([float(os.environ["AFINA_BENCH_SHELL"]), *clock]))
"""

SHELL = 'AFINA_BENCH_SHELL=$(date +%s.%N); export AFINA_BENCH_SHELL; exec "$@"'


class Place:
    """A folder with the model, a claimed run, the probe, and the shapes of the image."""

    def __init__(self, folder: Path, image: Path | None, model: Path | None, user: str | None) -> None:
        self.folder, self.image, self.user = folder, image, user
        self.mount: Path | None = None
        self.model = folder / "model"
        if model is None:
            tiny.tiny_model(self.model)
        else:
            shutil.copytree(model, self.model)
        (folder / "probe.py").write_text(PROBE)
        self.run = self._claim()
        self.give()

    def _claim(self) -> Path:
        tiny.write_csv(self.folder / "reviews.csv", tiny.tiny_reviews(120, 3))
        (self.folder / "scratch").mkdir()
        part = {"fraction": 0.5, "seed": 1}
        data = {"files": {"all": "reviews.csv"}, "text": "text", "label": "stars", "train": part, "eval": part}
        train = {"batch_size": 8, "max_steps": 2, "log_every": 1, "evaluate": 2, "keep": "last"}
        resources = {"gpus_per_node": 0}
        recipe = {
            "name": "startup",
            "baselines": False,
            "model": "model",
            "data": data,
            "tokens": {"max_length": 64},
            "train": train,
            "resources": resources,
        }
        (self.folder / "recipe.yaml").write_text(json.dumps(recipe))
        env = {**os.environ, "AFINA_SCRATCH": str(self.folder / "scratch"), "AFINA_RUNTIME": "none"}
        argv = [*AFINA, "claim", "--pointer", str(self.folder / "pointer"), "recipe.yaml"]
        subprocess.run(argv, cwd=self.folder, env=env, check=True, stdout=subprocess.DEVNULL)
        return Path((self.folder / "pointer").read_text())

    def give(self) -> None:
        """Give all files to the user who runs the container."""
        if self.user:
            account = pwd.getpwnam(self.user)
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)

    def as_user(self, argv: Sequence[str]) -> list[str]:
        return ["runuser", "-u", self.user, "--", *argv] if self.user else list(argv)

    def shape(self, way: str) -> Path:
        """The image in one of its shapes, made on first use."""
        assert self.image is not None
        if way in ("image", "node.sh"):
            return self.image
        if way == "kernel":
            if self.mount is None:
                self.mount = Path(tempfile.mkdtemp(prefix="afina-startup-kernel-"))
                where = f"loop,ro,offset={self._offset()}"
                subprocess.run(["mount", "-t", "squashfs", "-o", where, str(self.image), str(self.mount)], check=True)
            return self.mount
        unpacked = self.folder / "sandbox"
        if not unpacked.exists():
            argv = ["unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-offset", self._offset()]
            argv += ["-dest", str(unpacked), str(self.image)]
            subprocess.run(self.as_user(argv), stdout=subprocess.DEVNULL, check=False)
        if way == "sandbox":
            return unpacked
        packed = self.folder / f"{way.replace(':', '-')}.sqfs"
        if not packed.exists():
            kind, _, level = way.partition(":")
            argv = ["mksquashfs", str(unpacked), str(packed), "-quiet", "-no-progress", "-comp", kind]
            subprocess.run(self.as_user([*argv, *(["-Xcompression-level", level] if level else [])]), check=True)
        return packed

    def _offset(self) -> str:
        """Offset of the file system in the image."""
        lines = _output(["apptainer", "sif", "list", str(self.image)]).splitlines()
        return next(x.split("|")[3].split("-")[0].strip() for x in lines if "FS (Squashfs/*System" in x)

    def close(self) -> None:
        if self.mount is not None:
            subprocess.run(["umount", str(self.mount)], check=True)
            self.mount.rmdir()

    def argv(self, way: str, command: Sequence[str]) -> list[str]:
        if way == "plain":
            return [sys.executable, *command]
        shape = str(self.shape(way))
        inside = ["apptainer", "--quiet", "exec", "--no-home", "--bind", str(self.folder), shape, "python", *command]
        if way == "node.sh":
            return ["bash", str(ROOT / "slurm/node.sh"), shape, *inside]
        return inside

    def probe(self, way: str) -> dict[str, float]:
        command = self.argv(way, [str(self.folder / "probe.py"), str(self.model)])
        # The shell that reads the clock is in the container: before `python`, the word after the image.
        place = command.index("python") if way != "plain" else 0
        command[place:place] = ["sh", "-c", SHELL, "sh"]
        began = time.time()
        out = _output(command if way == "plain" else self.as_user(command), self._environment())
        clocks = [began, *json.loads(out.splitlines()[-1])]
        return {part: after - before for part, before, after in zip(PARTS, clocks, clocks[1:], strict=False)}

    def real(self, way: str, number: int) -> float:
        run = self.folder / f"run-{way.replace(':', '-')}-{number}"
        shutil.copytree(self.run, run)
        self.give()
        began = time.time()
        env = {**self._environment(), "AFINA_ATTEMPT": "bench-1", "AFINA_LAUNCH": "local"}
        command = self.argv(way, ["-m", "afina.worker", "launch", str(run)])
        _output(command if way == "plain" else self.as_user(command), env)
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        return float(next(e["time"] for e in events if e["event"] == "first_step") - began)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PATH", "LANG", "LC_", "OMP_"))}
        return {**kept, "HOME": str(self.folder), "TMPDIR": str(self.folder), "HF_HUB_OFFLINE": "1"}


def _output(argv: Sequence[str], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _drop_caches() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def measure(place: Place, ways: Sequence[str], rounds: int, *, cold: bool = False) -> list[dict[str, Any]]:
    """One record per way and round: seconds by part, and of the real run. Another way begins each round."""
    for way in ways:
        if way != "plain":
            place.shape(way)
    place.give()
    records = []
    for number in range(rounds):
        for way in [*ways[number % len(ways) :], *ways[: number % len(ways)]]:
            if cold:
                _drop_caches()
            parts = place.probe(way)
            if cold:
                _drop_caches()
            parts["afina"] = place.real(way, number)
            records.append({"way": way, "round": number, **{name: round(s, 4) for name, s in parts.items()}})
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Medians in seconds, one line a way; `all` is the sum of the parts."""
    ways = list(dict.fromkeys(record["way"] for record in records))
    lines = ["| way | " + " | ".join(PARTS) + " | all | afina |", "|---|" + "---|" * (len(PARTS) + 2)]
    for way in ways:
        mine = [record for record in records if record["way"] == way]
        medians = [statistics.median(record[part] for record in mine) for part in PARTS]
        whole = statistics.median(sum(record[part] for part in PARTS) for record in mine)
        cells = [*medians, whole, statistics.median(record["afina"] for record in mine)]
        lines.append(f"| {way} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


#: Imported at the start of every Python process; writes a line where the first training step ends.
HOOK = """
import importlib.abc, importlib.util, json, os, sys, time
BEGAN = time.time()
ROOTS = {"torch", "transformers", "datasets", "sklearn", "scipy", "accelerate", "pandas", "pyarrow", "numpy", "afina"}
SECONDS, ASKED, WITHIN = [0.0], set(), []
class Timed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ROOTS or name in ASKED:
            return None
        ASKED.add(name)
        spec = importlib.util.find_spec(name)
        ASKED.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module
        def timed(module):
            # A module that is imported within another counts as part of that one.
            began, outermost = time.time(), not WITHIN
            WITHIN.append(name)
            try:
                execute(module)
            finally:
                WITHIN.pop()
            SECONDS[0] += (time.time() - began) * outermost
            if name == "transformers.trainer":
                usual = module.Trainer.training_step
                def first(self, *arguments, **named):
                    module.Trainer.training_step = usual
                    at, imports = time.time(), SECONDS[0]
                    loss = usual(self, *arguments, **named)
                    with open(os.environ["AFINA_BENCH_HOOK"], "a") as file:
                        file.write(json.dumps([BEGAN, at, time.time(), imports, len(sys.modules)]) + "\\n")
                    return loss
                module.Trainer.training_step = first
        spec.loader.exec_module = timed
        return spec
sys.meta_path.insert(0, Timed())
"""


def first_step(argv: Sequence[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run a command; the seconds until its first training step has ended, by part."""
    note = folder / "hook.jsonl"
    note.unlink(missing_ok=True)
    began = time.time()
    subprocess.run(argv, env={**environment, "AFINA_BENCH_HOOK": str(note)}, check=True, stdout=subprocess.DEVNULL)
    process, step_begins, step_ends, imports, modules = json.loads(note.read_text().splitlines()[0])
    return {
        "before the process that trains": process - began,
        "imports": imports,
        "reading, building, measuring the peak": step_begins - process - imports,
        "the first step, without the optimizer": step_ends - step_begins,
        "all": step_ends - began,
        "modules": modules,
    }


def peers(folder: Path, rounds: int, rows: int, threads: int) -> dict[str, list[dict[str, float]]]:
    """`afina train` and the tutorial's script, in turn: the parts of each start."""
    (folder / "sitecustomize.py").write_text(HOOK)
    environment = environment_of(folder, threads)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    train, test = reviews.write_parts(folder, "short", rows)
    model = reviews.model_for("minilm", folder)
    recipe = folder / "recipe.yaml"
    data = {"files": {"train": str(train), "eval": str(test)}, "text": "text", "label": "stars"}
    settings = {"batch_size": 8, "max_steps": 2, "keep": "last"}
    recipe.write_text(
        json.dumps({"name": "start", "baselines": False, "model": str(model), "data": data, "train": settings})
    )
    script = Path(__file__).resolve().with_name("tutorial.py")
    tutorial = [sys.executable, str(script), "--train", str(train), "--eval", str(test), "--model", str(model)]
    tutorial += ["--out", str(folder / "steps.jsonl"), "--epochs", "1", "--sample", "16"]
    found: dict[str, list[dict[str, float]]] = {"tutorial": [], "afina": []}
    for number in range(-1, rounds):
        afina = [*AFINA, "train", str(recipe), "--run", str(folder / f"run{number}")]
        for peer, argv in (("tutorial", tutorial), ("afina", afina)):
            parts = first_step(argv, folder, environment)
            if number >= 0:
                found[peer].append(parts)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="a .sif; without it only the way `plain`")
    parser.add_argument("--ways", default="plain,image,node.sh,sandbox,gzip,zstd:3", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each run; as root")
    parser.add_argument("--model", type=Path, help="a model folder; by default a tiny random one")
    parser.add_argument("--user", help="who runs the container, where root cannot")
    parser.add_argument("--peers", action="store_true", help="`afina train` beside the tutorial's script instead")
    parser.add_argument("--rows", type=int, default=1000, help="with --peers: rows that are read")
    parser.add_argument("--threads", type=int, default=2, help="with --peers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    ways = options.ways.split(",") if options.image else ["plain"]
    with tempfile.TemporaryDirectory(prefix="afina-startup-") as name:
        if options.peers:
            both = peers(Path(name), options.rounds, options.rows, options.threads)
            lines = ["| seconds | tutorial | afina |", "|---|---|---|"]
            for part in both["afina"][0]:
                cells = (ranged([record[part] for record in records]) for records in both.values())
                lines.append(f"| {part} | {' | '.join(cells)} |")
            found: dict[str, Any] = {"peers": both}
        else:
            Path(name).chmod(0o755)
            place = Place(Path(name), options.image and options.image.resolve(), options.model, options.user)
            try:
                records = measure(place, ways, options.rounds, cold=options.cold)
                sizes = {w: place.shape(w).stat().st_size for w in ways if w not in ("plain", "sandbox", "kernel")}
            finally:
                place.close()
            lines = [table(records), *(f"{way}: {size / 1e6:.0f} MB" for way, size in sizes.items())]
            found = {"records": records, "size_bytes": sizes, "cores": os.cpu_count()}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
