"""What a failed attempt says, and that it is true: the next attempt is named only where another attempt can get further."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from afina.errors import EnvironmentProblem, TrainingError
from afina.recipe.schema import Recipe
from afina.run.directory import RunDir
from afina.run.new_run import claim
from afina.run.plan import make_plan
from afina.run.requeue import decide
from afina.site.settings import Site
from afina.worker.training.train import explain_failure


@pytest.fixture
def run(recipe: Callable[..., Recipe], recipe_file: Callable[..., Path], site: Site, tmp_path: Path) -> RunDir:
    return claim(make_plan(recipe(), site, recipe_file=recipe_file()), {}, ["false"], "", tmp_path / "a run")


CONTINUES, BEGINS = (
    "`afina submit` continues from the newest checkpoint (step 10)",
    "`afina submit` begins at the first step",
)
ANOTHER = "start another run"
FULL = "then `afina submit`"

#: What was raised; whether the first step was made; checkpoints; the cause; what the remedy says; what the job does then.
TABLE = [
    (OSError(errno.ENOSPC, "No space left on device", "x"), True, 10, "disk", FULL, "end"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), True, 0, "disk", FULL, "end"),
    (OSError(errno.EFBIG, "File too large", "x"), True, 10, "disk", "`ulimit -f`", "end"),
    (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704"), True, 10, "disk", FULL, "end"),
    (Exception("SafetensorError: I/O error: No space left on device (os error 28)"), True, 10, "disk", FULL, "end"),
    (OSError(errno.EIO, "Input/output error", "x"), True, 10, "disk", "once it works, `afina submit`", "end"),
    (PermissionError(errno.EACCES, "Permission denied", "/"), True, 10, "", "choose a folder that you may write", "end"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), True, 10, "", f"put it back; then {CONTINUES}", "end"),
    (MemoryError(), True, 10, "memory", ANOTHER, "requeue"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True, 10, "memory", ANOTHER, "requeue"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True, 10, "memory", ANOTHER, "requeue"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), False, 0, "memory", ANOTHER, "requeue"),
    (TypeError("optimizer() got an unexpected keyword"), False, 0, "code", ANOTHER, "end"),
    (IndexError("index out of range in self"), True, 10, "code", ANOTHER, "end"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, 0, "code", ANOTHER, "end"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True, 10, "RuntimeError", CONTINUES, "requeue"),
    (RuntimeError("NCCL error: unhandled system error"), False, 0, "RuntimeError", BEGINS, "requeue"),
    (RuntimeError("CUDA error: uncorrectable ECC error"), True, 10, "RuntimeError", CONTINUES, "requeue"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), False, 10, "ConnectionResetError", CONTINUES, "requeue"),
    (TrainingError("the loss is not finite", "lower it", cause="loss"), True, 10, "loss", "lower it", "end"),
    (EnvironmentProblem("a broken node", "exclude it", cause="node", nodes=("n1",)), False, 0, "node", "exclude it", "requeue"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "stepped", "saved", "cause", "remedy", "then"), TABLE, ids=lambda value: str(value)[:40]
)
def test_each_cause(
    run: RunDir, error: Exception, stepped: bool, saved: int, cause: str, remedy: str, then: str
) -> None:
    run.begin_attempt("1.0")
    if stepped:
        run.event("first_step", attempt="1.0", step=1)
    if saved:
        (folder := run.checkpoints / f"step-{saved}").mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    explained = explain_failure(error, run, "1.0")
    assert explained.cause == cause and remedy in explained.remedy, explained.remedy
    outcome = run.record_failure("1.0", explained.failure)
    assert decide(run, outcome).action == then
    if ANOTHER in remedy:
        assert "afina submit" not in explained.remedy


def test_a_run_without_jobs_is_continued_here(run: RunDir) -> None:
    run.begin_attempt()
    error = OSError(errno.ENOSPC, "No space left on device", "x")
    assert "then `afina resume`" in explain_failure(error, run, "local-1").remedy
