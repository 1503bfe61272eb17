from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.conftest import private_mounts, tree

from afina.errors import ClaimedError, EnvironmentProblem, Failure, InputError
from afina.files import write_atomic
from afina.recipe.schema import Recipe
from afina.run.causes import ensure_outcome
from afina.run.commands import sbatch_argv
from afina.run.directory import RunDir, is_run_dir
from afina.run.new_run import check_free, claim, next_free
from afina.run.outcome import Outcome
from afina.run.plan import Plan, make_plan
from afina.site.settings import Site

ARGV = [
    "python",
    "-m",
    "worker",
    "a b",
    "'; echo foo",
    "$(touch pwned)",
    "{run}/not this",
    "line\nbreak",
    "",
    "☃",
    "{run}",
]


@pytest.fixture
def plan(recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site) -> Plan:
    return make_plan(recipe(), site, recipe_file=recipe_file())


def claimed(plan: Plan, path: Path | None = None) -> RunDir:
    return claim(plan, {"prepared": "/p", "model": "/m"}, ARGV, "name: as written ☃\n", path)


def _names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- claiming ----------------------------------------------------------------------------------------------------------


def test_a_claimed_directory_holds_what_the_run_is(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "above" / "r un")
    assert is_run_dir(run.path) and run.plan() == plan
    assert run.prepared() == {"prepared": "/p", "model": "/m"}
    assert (run.path / "recipe.yaml").read_text(encoding="utf-8") == "name: as written ☃\n"
    assert run.worker_argv() == [*ARGV[:-1], str(run.path)]
    assert sorted(p.name for p in run.path.iterdir()) == [
        "attempts",
        "plan.json",
        "prepared.json",
        "recipe.yaml",
        "worker.argv",
    ]
    assert (mode(run.path), mode(run.attempts)) == (0o700, 0o700)
    assert run.outcome() is None and run.metrics() == [] and run.attempt_names() == []


def test_mode_is_private_under_any_umask(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "27").mkdir(mode=0o755)  # an empty folder may be claimed
    for mask in (0o000, 0o077, 0o027):
        before = os.umask(mask)
        try:
            run = claimed(plan, tmp_path / f"{mask:o}")
        finally:
            os.umask(before)
        assert (mode(run.path), mode(run.attempts)) == (0o700, 0o700)


def test_a_groups_folder_passes_its_group_on(plan: Plan, tmp_path: Path) -> None:
    """Setgid on scratch: the run is charged to the group's quota."""
    (tmp_path / "group").mkdir()
    (tmp_path / "group").chmod(0o2775)
    run = claimed(plan, tmp_path / "group/run")
    assert mode(run.path) == 0o2700 and mode(run.attempts) == 0o2700


def test_secrets_in_the_sites_words_stay_out_of_the_plan(plan: Plan, tmp_path: Path) -> None:
    words = {"SBATCH_COMMENT": "token=abcdef123", "SBATCH_ACCOUNT": "mine"}
    site = plan.site.model_copy(update={"sbatch": words, "sbatch_extra": ("--comment=ghp_" + "a1" * 15,)})
    run = claimed(plan.model_copy(update={"site": site}), tmp_path / "r")
    kept = run.plan().site
    assert kept.sbatch == {"SBATCH_COMMENT": "token=***", "SBATCH_ACCOUNT": "mine"}
    assert kept.sbatch_extra == ("--comment=***",)


def test_the_path_is_absolute(plan: Plan) -> None:
    run = claimed(plan, Path("relative"))
    assert run.path == Path.cwd() / "relative" and run.worker_argv()[-1] == str(run.path)


def test_numbering(plan: Plan) -> None:
    stem = plan.site.runs / f"amazon-stars-{plan.digest[:8]}"
    assert next_free(plan).path == Path(f"{stem}-1") and not plan.site.runs.exists()
    assert [claimed(plan).path for _ in range(3)] == [Path(f"{stem}-{n}") for n in (1, 2, 3)]
    Path(f"{stem}-4").write_text("a file is in the way")
    Path(f"{stem}-5").mkdir()
    assert claimed(plan).path == Path(f"{stem}-6")


def test_a_claimed_directory_is_refused_and_untouched(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "it's")
    before = tree(run.path)
    with pytest.raises(ClaimedError) as caught:
        claimed(plan, run.path)
    assert caught.value.exit_code == 2 and caught.value.message == f"{run.path}: this run directory is already claimed"
    assert "afina resume '/" in caught.value.remedy and "it'\"'\"'s'" in caught.value.remedy
    with pytest.raises(ClaimedError):
        check_free(run.path)
    assert tree(run.path) == before


@pytest.mark.parametrize("kind", ["folder", "hidden", "file", "link"])
def test_what_is_not_ours_is_refused_and_untouched(plan: Plan, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "theirs"
    if kind == "file":
        path.write_text("precious")
    elif kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        (path / (".git" if kind == "hidden" else "thesis.tex")).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(EnvironmentProblem if kind == "link" else InputError) as caught:
        claimed(plan, path)
    assert not isinstance(caught.value, ClaimedError) and str(path) in caught.value.message
    assert tree(tmp_path) == before


def test_nasty_names(plan: Plan, tmp_path: Path, nasty: str) -> None:
    run = claimed(plan, tmp_path / nasty)
    assert run.worker_argv() == [*ARGV[:-1], str(tmp_path / nasty)] and run.plan() == plan
    named = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"name": nasty})})
    name = nasty.replace("\\", "_")
    assert claimed(named).path.name == f"{name}-{plan.digest[:8]}-1"


def test_a_backslash_is_no_part_of_a_folder_that_slurm_logs_into(plan: Plan) -> None:
    named = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"name": r"a\b"})})
    path = next_free(named).path
    assert path.name.startswith("a_b-") and sbatch_argv(named, path)
    with pytest.raises(InputError, match="a backslash in its name"):
        sbatch_argv(plan, path.with_name(r"c\d"))


CLAIM = """
import sys, time
from afina.run.plan import load_plan
from afina.run.new_run import claim
from afina.errors import ClaimedError, InputError
plan = load_plan(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    print("won", claim(plan, {}, ["{run}"], "", sys.argv[2] or None).path)
except ClaimedError:
    print("claimed")
"""


def race(plan: Plan, tmp_path: Path, path: str, processes: int = 4) -> list[str]:
    file = tmp_path / "plan of all.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CLAIM, str(file), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.communicate(timeout=60)[0].strip() for process in started]


def test_of_many_that_claim_one_directory_exactly_one_wins(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "above" / "the one"
    answers = race(plan, tmp_path, str(path))
    assert sorted(answers) == ["claimed"] * 3 + [f"won {path}"]
    assert RunDir(path).plan() == plan and RunDir(path).worker_argv() == [str(path)]


def test_many_at_once_get_numbers_of_their_own(plan: Plan, tmp_path: Path) -> None:
    answers = race(plan, tmp_path, "")
    assert len(set(answers)) == 4 and all(line.startswith("won ") for line in answers)
    stem = f"amazon-stars-{plan.digest[:8]}"
    assert sorted(_names(plan.site.runs)) == sorted(f"{stem}-{n}" for n in range(1, 5))


# -- no space ----------------------------------------------------------------------------------------------------------

CLAIM_FULL = """
import os, sys
from afina.errors import AfinaError
from afina.run.plan import load_plan
from afina.run.new_run import claim
plan = load_plan(sys.argv[1])
try:
    claim(plan, {}, ["{run}"] * 9000, "x" * int(sys.argv[3]), sys.argv[2])
except AfinaError as error:
    print(error)
    print(sorted(os.listdir(sys.argv[4])))
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("size", "recipe_bytes", "above"), [("4k", 100, ""), ("12k", 100, "above/"), ("4k", 100_000, "above/")]
)
def test_a_full_disk_leaves_nothing_half_made(
    plan: Plan, tmp_path: Path, size: str, recipe_bytes: int, above: str
) -> None:
    file = tmp_path / "plan of all.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    small = tmp_path / "small"
    small.mkdir()
    done = private_mounts(
        f'mount -t tmpfs -o size={size} tmpfs "$3"; exec "$1" -W error -c "$2" "$4" "$3/{above}run" {recipe_bytes} "$3"',
        sys.executable,
        CLAIM_FULL,
        small,
        file,
    )
    assert done.returncode == 3, done
    assert "No space left on device" in done.stdout and "remedy: free space or quota" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]", "left behind"


def test_a_disk_without_inodes_leaves_nothing(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan of all.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    for inodes in (3, 5):
        small = tmp_path / f"small{inodes}"
        small.mkdir()
        done = private_mounts(
            f'mount -t tmpfs -o size=1m,nr_inodes={inodes} tmpfs "$3"; exec "$1" -W error -c "$2" "$4" "$3/a/run" 9 "$3"',
            sys.executable,
            CLAIM_FULL,
            small,
            file,
        )
        assert done.returncode == 3 and done.stdout.splitlines()[-1] == "[]", (inodes, done)


def test_a_read_only_place(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan of all.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    done = private_mounts(
        'mount -t tmpfs -o ro tmpfs "$3"; exec "$1" -W error -c "$2" "$4" "$3/a/run" 9 "$3"',
        sys.executable,
        CLAIM_FULL,
        tmp_path / "working 'here'",
        file,
    )
    assert done.returncode == 3 and "Read-only file system" in done.stdout, done


# -- writing -----------------------------------------------------------------------------------------------------------


def test_write_atomic_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    write_atomic(path, "one ☃")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two" and _names(tmp_path).count("a file") == 1
    assert [n for n in _names(tmp_path) if n.startswith(".")] == []


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "x").write_text("")
    with pytest.raises(EnvironmentProblem):  # a folder is in the way of os.replace
        write_atomic(folder / "full", "data")
    assert _names(folder) == ["full"]
    for absent in (folder / "not there" / "x", folder / "full" / "x" / "y"):
        with pytest.raises(EnvironmentProblem) as caught:
            write_atomic(absent, "data")
        assert caught.value.message.startswith(f"{absent}: ")


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path, size, stop = tmp_path / "f", 300_000, threading.Event()
    write_atomic(path, b"0" * size)

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            write_atomic(path, str(turn % 10).encode() * size)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(50):
            raw = path.read_bytes()
            assert len(raw) == size and len(set(raw)) == 1
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert _names(tmp_path).count("f") == 1 and not [n for n in _names(tmp_path) if n.startswith(".f")]


def test_append_and_lines(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    run.append("submissions.jsonl", {"job_id": "7", "name": "a\nb ☃"})
    run.event("began", node=0)
    (first,) = run.lines("submissions.jsonl")
    assert (first["job_id"], first["name"]) == ("7", "a\nb ☃") and first["time"] > 1.6e9
    assert [e["event"] for e in run.lines("events.jsonl")] == ["began"]
    assert list(run.lines("absent.jsonl")) == []
    assert mode(run.path / "events.jsonl") == 0o600


def test_a_torn_last_line_is_left_out_and_does_not_take_the_next_with_it(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    whole = json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + "\n"
    for cut in (5, 2, 9):
        run.metrics_file.write_text(whole[:-cut])
        assert run.metrics() == [{"step": 1}]
    run.metrics_file.write_bytes(whole.encode() + b'{"text": "\xe2\x98')
    assert run.metrics() == [{"step": 1}, {"step": 2}]
    run.append("metrics.jsonl", {"step": 3})
    assert [m["step"] for m in run.metrics()] == [1, 2, 3]


def test_concurrent_appends_are_all_there(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    threads = [
        threading.Thread(target=lambda k=k: [run.event("e", k=k, i=i, pad="x" * 500) for i in range(50)])  # type: ignore[misc]
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((e["k"], e["i"]) for e in run.lines("events.jsonl")) == [(k, i) for k in range(4) for i in range(50)]


# -- attempts and outcomes ---------------------------------------------------------------------------------------------


def outcome(**changes: Any) -> Outcome:
    return Outcome.model_validate({"outcome": "finished", "exit_code": 0, "attempt": "local-1", **changes})


def test_attempts_are_numbered_or_named(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    assert [run.begin_attempt().name for _ in range(2)] == ["local-1", "local-2"]
    assert run.begin_attempt("77.0") == run.begin_attempt("77.0") == run.attempts / "77.0"
    assert sorted(run.attempt_names()) == ["77.0", "local-1", "local-2"]
    assert mode(run.attempts / "77.0") == 0o700


def test_an_outcome_is_recorded_with_its_exit_code_for_a_shell(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    folder = run.begin_attempt()
    written = outcome(metrics={"eval_accuracy": 0.5, "eval_confusion_matrix": [[1, 2], [3, 4]]}, labels=["a, b", "☃"])
    run.record(written)
    assert run.outcome() == written and (folder / "exit").read_text() == "0\n"
    run.record(outcome(outcome="stopped", exit_code=75, attempt="not there"))
    assert run.outcome() is not None and (folder / "exit").read_text() == "0\n"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"outcome": "weird"}'])
def test_an_outcome_that_cannot_be_read_is_none(plan: Plan, tmp_path: Path, text: str) -> None:
    run = claimed(plan, tmp_path / "r")
    run.outcome_file.write_text(text)
    assert run.outcome() is None


def test_an_outcome_of_a_later_version_is_read(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    run.outcome_file.write_text(json.dumps({**outcome().model_dump(), "new": 1}))
    assert run.outcome() == outcome()


def test_a_failure_does_not_overwrite_what_the_attempt_said(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    run.begin_attempt("local-1")
    run.record(outcome(global_step=7))
    assert run.record_failure("local-1", Failure("TrainingError", "killed")).outcome == "finished"
    assert run.record_failure("local-2", Failure("TrainingError", "a later attempt")).outcome == "finished"
    run.record(outcome(outcome="stopped", exit_code=75))
    failed = run.record_failure("local-2", Failure("TrainingError", "it broke", "mend it"))
    assert (failed.outcome, failed.exit_code, failed.error) == ("failed", 4, "it broke\n  remedy: mend it")
    assert run.outcome() == failed


@pytest.mark.parametrize(
    ("code", "says", "recorded"),
    [(-9, "signal 9", 4), (137, "signal 9", 4), (1, "exit code 1", 4), (3, "exit code 3", 3), (2, "exit code 2", 3)],
)
def test_an_attempt_that_recorded_nothing_gets_an_outcome(
    plan: Plan, tmp_path: Path, code: int, says: str, recorded: int
) -> None:
    run = claimed(plan, tmp_path / "it's")
    folder = run.begin_attempt("9.0")
    (folder / "node0.log").write_bytes(b"first\n" * 100 + b"Killed \xff here\n")
    ended = ensure_outcome(run, "9.0", code)
    assert (ended.outcome, ended.exit_code) == ("failed", recorded)
    assert says in (ended.error or "") and "| Killed" in (ended.error or "") and "remedy: " in (ended.error or "")
    assert (folder / "exit").read_text() == f"{recorded}\n"


def test_the_failure_that_a_rank_reported_becomes_the_outcome(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "r")
    folder = run.begin_attempt("9.0")
    (folder / "failed.rank0.json").write_text('{"error": "cut o')
    reported = Failure("TrainingError", "loss is NaN", "lower the rate", "loss")
    run.report_failure("9.0", "rank1", reported)
    run.report_failure("9.0", "rank2", Failure("TrainingError", "a later one"))
    assert ensure_outcome(run, "9.0", 1).failure == reported


def test_a_run_goes_on_where_it_was_begun(plan: Plan, tmp_path: Path) -> None:
    run = claimed(plan, tmp_path / "a run")
    run.check_place()
    copy = RunDir(shutil.copytree(run.path, tmp_path / "copy"))
    with pytest.raises(InputError, match=r"is a copy of .*, and would write there"):
        copy.check_place()
    moved = RunDir(run.path.rename(tmp_path / "moved"))
    with pytest.raises(InputError, match="has been moved") as caught:
        moved.check_place()
    run.path.symlink_to(moved.path)
    moved.check_place()
    assert caught.value.remedy.endswith(f"ln -s {moved.path} '{run.path}'")
