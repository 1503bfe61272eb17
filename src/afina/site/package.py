"""Files that come with afina beside its modules: batch scripts, recipes, examples of sites, the documentation, and what the image is built from.

In a wheel they lie in the package (`_slurm`, `_docs`, `_build`), in a checkout around it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from afina.errors import EnvironmentProblem, InputError

__all__ = ["build_folder", "copy_slurm_files", "docs_folder", "slurm_folder", "with_pages"]

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parents[1]


def slurm_folder() -> Path:
    """The folder of batch scripts, recipes and examples.

    Raises:
        EnvironmentProblem: it is missing.
    """
    for folder in (_PACKAGE / "_slurm", _CHECKOUT / "slurm"):
        if (folder / "finetune.sbatch").is_file():
            return folder
    raise EnvironmentProblem("the batch scripts are not installed with afina", "install afina again")


def docs_folder() -> Path:
    """The folder of the documentation's pages."""
    installed = _PACKAGE / "_docs"
    return installed if installed.is_dir() else _CHECKOUT / "docs"


def with_pages(text: str) -> str:
    """`text` in which a page of the documentation is named by its path on this machine."""

    def path(match: re.Match[str]) -> str:
        page = docs_folder() / match[1]
        return str(page) if page.is_file() else match[0]

    return re.sub(r"(?<![\w/])docs/([a-z-]+\.md)", path, text)


def copy_slurm_files(folder: Path) -> list[Path]:
    """Copy batch scripts, recipes and examples into `folder`/slurm; files that are there already stay if they are the same.

    Raises:
        InputError: one is there with another content; nothing was copied.
        OSError: they cannot be written.
    """
    source = slurm_folder()
    files = {path: folder / "slurm" / path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()}
    files = {path: target for path, target in files.items() if path.name != "site.env"}
    for path, target in files.items():
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise InputError(f"{target} exists already and differs", "move it away, or choose another folder")
    for path, target in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(path.stat().st_mode & 0o777)
    return list(files.values())


@contextlib.contextmanager
def build_folder() -> Iterator[Path]:
    """A folder laid out as a checkout, in which `container/build.sh` works: the checkout, or one made from the package.

    Raises:
        EnvironmentProblem: this afina has neither.
    """
    if (_CHECKOUT / "container/build.sh").is_file():
        yield _CHECKOUT
        return
    if not (_PACKAGE / "_build").is_dir():
        raise EnvironmentProblem("what the image is built from is not installed with afina", "install afina again")
    import tempfile

    with tempfile.TemporaryDirectory(prefix="afina-build-") as made:
        folder = Path(made)
        shutil.copytree(_PACKAGE / "_build", folder, dirs_exist_ok=True)
        shutil.copytree(_PACKAGE / "_slurm", folder / "slurm")
        shutil.copytree(_PACKAGE / "_docs", folder / "docs")
        own = shutil.ignore_patterns("_build", "_slurm", "_docs", "__pycache__")
        shutil.copytree(_PACKAGE, folder / "src/afina", ignore=own)
        yield folder
