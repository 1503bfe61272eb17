"""The state of the git repository around a recipe: its commit, and the changes since.

Reads only, runs no hook, no pager and no external diff, and takes no lock. Without git, without a repository, or with one of another user
that git refuses to open, the state is one line with the reason, never an error. Files that end in `.env` are left out of the difference: they name an account.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

from afina.redact import redact_settings

__all__ = ["MOST_BYTES", "repository_state"]

#: The most that is kept of a difference.
MOST_BYTES = 256 * 1024
_TIMEOUT_S = 10.0
_SETTINGS = ("core.fsmonitor=false", "core.hooksPath=/dev/null", "core.quotePath=false", "diff.external=")
_LEFT_OUT = (":(exclude,glob)**/*.env", ":(exclude,glob)**/.env*")


def repository_state(recipe: Path) -> dict[str, Any]:
    """Commit, branch and changes of the repository of `recipe`.

    Returns:
        `commit` (None before the first), `branch`, `recipe` (unchanged, changed, untracked), `changed` (tracked files that differ from the
        commit), `untracked` (their number), `diff` (redacted; the recipe too if it is untracked), `diff_cut`, `diff_sha256` (before it was
        cut or redacted; None if it was cut). Or `none`: the reason.
    """
    folder = recipe.parent
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or not top[1].strip():
        return {"none": "git is not installed here" if top is None else "the recipe is in no git repository"}
    root = Path(top[1].rstrip("\n"))
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    known = commit[1].strip() if commit and commit[0] == 0 else None
    branch = _git(root, "symbolic-ref", "--short", "--quiet", "HEAD")
    listed = _git(root, "status", "--porcelain", "-z", "--untracked-files=normal")
    entries = [entry for entry in (listed[1] if listed else "").split("\0") if len(entry) > 3]
    changed = [entry[3:] for entry in entries if not entry.startswith("??")]
    tracked = _git(folder, "ls-files", "--error-unmatch", "--", recipe.name)
    is_tracked = tracked is not None and tracked[0] == 0
    same = _git(folder, "diff", "--quiet", "HEAD", "--", recipe.name) if is_tracked and known else None
    diff, cut = _difference(root, known)
    if not is_tracked and not cut:
        more, cut = _read(folder, ["diff", *_PLAIN, "--no-index", "--", os.devnull, recipe.name])
        diff += more
    return {
        "commit": known,
        "branch": branch[1].strip() or None if branch else None,
        "recipe": "untracked" if not is_tracked else "unchanged" if same and same[0] == 0 else "changed",
        "changed": changed[:200],
        "untracked": sum(entry.startswith("??") for entry in entries),
        "diff": redact_settings(diff[:MOST_BYTES].decode(errors="replace")),
        "diff_cut": cut,
        "diff_sha256": None if cut else hashlib.sha256(diff).hexdigest(),
    }


_PLAIN = ("--no-ext-diff", "--no-textconv", "--no-color")


def _difference(root: Path, commit: str | None) -> tuple[bytes, bool]:
    """The difference of tracked files to the commit, and whether it was cut."""
    return _read(root, ["diff", *_PLAIN, commit, "--", ".", *_LEFT_OUT]) if commit else (b"", False)


def _read(folder: Path, words: list[str]) -> tuple[bytes, bool]:
    """At most `MOST_BYTES` + 1 of git's output; whether there was more, or it took too long."""
    try:
        process = subprocess.Popen(
            _argv(folder, *words),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return b"", False
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(_TIMEOUT_S, stop)
    timer.start()
    try:
        assert process.stdout is not None
        with process.stdout:
            output = process.stdout.read(MOST_BYTES + 1)
        if len(output) > MOST_BYTES:
            process.kill()
        process.wait()
    finally:
        timer.cancel()
    return output, late.is_set() or len(output) > MOST_BYTES


def _git(folder: Path, *words: str) -> tuple[int, str] | None:
    """Exit code and output of a git command; None where there is no git, or it does not answer."""
    try:
        done = subprocess.run(
            _argv(folder, *words),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.returncode, done.stdout.decode(errors="replace")


def _argv(folder: Path, *words: str) -> list[str]:
    settings = [word for setting in _SETTINGS for word in ("-c", setting)]
    return ["git", "--no-pager", *settings, "-C", str(folder), *words]


def _environment() -> dict[str, str]:
    # A hook's GIT_DIR would answer for another repository.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {**kept, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
