from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from tests.common import ROOT

_ROOMS = [p.parent if p.stem == "__init__" else p.with_suffix("") for p in (ROOT / "src/afina").rglob("*.py")]
HOST = sorted(
    ".".join(p.relative_to(ROOT / "src/afina").parts)
    for p in _ROOMS
    if p.name not in ("afina", "__main__") and "worker" not in p.parts and "_slurm" not in p.parts
)
HEAVY = (
    "torch", "transformers", "datasets", "evaluate", "accelerate", "numpy", "pandas", "pyarrow", "sklearn", "scipy",
)  # fmt: skip
LATE = (*HEAVY, "submitit", "matplotlib")


def loaded_after(code: str) -> list[str]:
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nprint('\\n', *sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    return done.stderr.split()


@pytest.mark.parametrize(
    "code",
    [
        "import afina",
        "import afina.cli",
        "from afina.cli import main; main(['--help'])",
        "from afina.cli import main; main(['train', '--help'])",
        "from afina.cli import main; main(['--version'])",
    ],
)
def test_starting_imports_nothing_heavy(code: str) -> None:
    modules = loaded_after(code)
    assert "afina" in modules
    assert [m for m in LATE if m in modules] == []
    assert "pydantic" not in modules, "help needs no validation"


def test_importing_afina_loads_its_version_alone() -> None:
    """Everything else is imported when a name is first used, and the functions that submit and wait load nothing heavy either."""
    assert {m for m in loaded_after("import afina") if m.partition(".")[0] == "afina"} == {"afina", "afina.version"}
    used = loaded_after("import afina; [getattr(afina, name) for name in afina.__all__]")
    assert "afina.api" in used and [m for m in LATE if m in used] == []


def test_no_host_module_imports_the_worker_or_torch() -> None:
    script = f"""
import importlib, sys
for name in {HOST!r}:
    importlib.import_module("afina." + name)
    print(name, *(module for module in sys.modules if module in {HEAVY!r} or module.startswith("afina.worker")))
"""
    argv = [sys.executable, "-X", "dev", "-W", "error", "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == HOST, "the first line that is too long names the module that imports too much"


def test_the_public_api_resolves() -> None:
    import afina

    for name in afina.__all__:
        assert callable(getattr(afina, name)) or isinstance(getattr(afina, name), str), name
    assert {"submit", "train"} <= set(afina.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = afina.no_such_name


def _public(path: Path) -> set[str]:
    """Names that a module defines at its top and does not hide."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")} | (found & {"__version__"})


#: Type aliases and the like: public for readers of the module, not part of what it gives.
_PRIVATE_BY_HABIT = {"F", "Array", "Say", "Row"}


@pytest.mark.parametrize("name", HOST)
def test_all_is_what_the_module_defines(name: str) -> None:
    room = ROOT / "src/afina" / name.replace(".", "/")
    path = room / "__init__.py" if room.is_dir() else room.with_suffix(".py")
    module = importlib.import_module(f"afina.{name}")
    public = _public(path)
    if not public and room.is_dir():  # a room that only says what is in it
        return
    assert set(module.__all__) - {"__version__"} <= public, "named in __all__, not defined"
    classes_and_functions = {
        n
        for n in public
        if callable(getattr(module, n)) and getattr(getattr(module, n), "__module__", "") == module.__name__
    }
    assert classes_and_functions - set(module.__all__) - _PRIVATE_BY_HABIT == set(), (
        "defined, not in __all__ and not hidden"
    )
    assert len(set(module.__all__)) == len(module.__all__)


def test_every_module_says_what_it_is() -> None:
    for path in (ROOT / "src/afina").rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
