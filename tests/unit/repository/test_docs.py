"""What README and docs promise, held against the code: keys, commands, messages, files, links."""

from __future__ import annotations

import ast
import importlib
import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel
from tests.common import ROOT

from afina import errors
from afina.cli import cli
from afina.recipe.keys.adapter_keys import Adapter
from afina.recipe.keys.data_keys import Data, Part
from afina.recipe.keys.resource_keys import Resources
from afina.recipe.keys.train_keys import Tokens, Train
from afina.recipe.metrics import METRICS
from afina.recipe.parse import load_recipe, parse_recipe
from afina.recipe.schema import Recipe
from afina.run.outcome import Outcome
from afina.site.settings import CACHE_VARIABLES

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("*.md")),
]
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(language: str) -> list[tuple[Path, str]]:
    return [
        (page, text) for page in PAGES for kind, text in _FENCE.findall(page.read_text("utf-8")) if kind == language
    ]


def _shell_lines() -> Iterator[tuple[str, str]]:
    """Lines of shell blocks and inline code, with the page they are on."""
    for page, text in _blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            yield page.name, line
    for page, text in _blocks("console"):
        for line in text.splitlines():
            if line.startswith("$ "):
                yield page.name, line[2:].partition(" && ")[0]
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text("utf-8"))):
            yield page.name, span


def _commands(program: str) -> list[tuple[str, list[str]]]:
    found = []
    for page, line in _shell_lines():
        if re.match(rf"(\w+=\S* )*{program} ", line) and "…" not in line:
            words = shlex.split(line, comments=True)
            while "=" in words[0]:
                words.pop(0)
            found.append((page, words[1:]))
    return found


def _parse(words: list[str]) -> None:
    """Parse as click would, and call nothing."""
    if words[0].startswith("-"):
        assert words in (["--help"], ["--version"]), words
        return
    command = cli.commands.get(words[0])
    assert command is not None, f"afina {words[0]}: no such command; there are {', '.join(cli.commands)}"
    if len(words) == 1:  # the command is spoken of, not called
        return
    command.make_context(f"afina {words[0]}", list(words[1:]), parent=click.Context(cli))


AFINA = _commands("afina")


@pytest.mark.parametrize(("page", "words"), AFINA, ids=[" ".join(w) for _, w in AFINA])
def test_every_afina_command_parses(page: str, words: list[str]) -> None:
    _parse(words)


def test_the_documents_name_every_command() -> None:
    named = {words[0] for _, words in AFINA}
    assert named == {name for name, command in cli.commands.items() if not command.hidden}


def test_a_wrong_command_does_not_parse() -> None:
    with pytest.raises(click.UsageError):
        _parse(["train", "recipe.yaml", "--nodes", "2"])
    with pytest.raises(AssertionError):
        _parse(["tarin", "recipe.yaml"])


def test_recipes_on_the_command_lines_exist() -> None:
    words = {w for _, line in [*AFINA, *_commands("sbatch"), *_commands("apptainer")] for w in line}
    recipes = {w for w in words if w.startswith("slurm/")}
    assert len(recipes) >= 3
    for path in recipes:
        assert (ROOT / path).is_file(), path
        if path.endswith(".yaml"):
            load_recipe(ROOT / path)


def test_the_image_and_the_batch_script_are_called_with_what_afina_takes() -> None:
    apptainer = [w for _, w in _commands("apptainer") if w[0] == "run"]
    sbatch = [w for _, w in _commands("sbatch") if len(w) > 1]
    assert apptainer and sbatch
    for words in apptainer:
        _parse(words[words.index("afina.sif") + 1 :])
    for words in sbatch:
        assert words[0] == "slurm/finetune.sbatch"
        _parse(["train", *words[1:]])


def test_nothing_is_installed_from_an_index_where_afina_is_not() -> None:
    """There is no release yet: `pip install afina` would fetch a stranger's package."""
    for path in [*PAGES, *(ROOT / "src").rglob("*.py")]:
        assert not re.search(r"pip install ['\"]?afina\b", path.read_text("utf-8")), path


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = {words[0] for _, words in _commands("make")}
    assert {"demo", "test", "check", "test-cluster"} <= targets
    for target in targets:
        assert re.search(rf"(?m)^{target}:.*##", makefile), f"make {target}"
    ci = (ROOT / ".ci/run").read_text("utf-8")
    assert re.findall(r"(?m)^(?:last_)?stage make (\S+)$", ci) == [
        "demo",
        "check",
        "test",
        "test-series",
        "test-cluster",
    ]


def test_scripts_that_are_named_exist_and_can_be_run() -> None:
    scripts = {line.split()[0] for _, line in _shell_lines() if re.match(r"(container|tests|slurm)/\S+\.sh\b", line)}
    assert "container/build.sh" in scripts
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o100, script


@pytest.mark.parametrize("model", [Recipe, Data, Part, Tokens, Train, Adapter, Resources], ids=lambda m: m.__name__)
def test_every_key_is_in_its_table(model: type[BaseModel]) -> None:
    rows = _rows("recipe.md", model.__name__)
    keys = [key for row in rows for key in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(keys) == sorted(model.model_fields)


@pytest.mark.parametrize("model", [Recipe, Data, Part, Tokens, Train, Adapter, Resources], ids=lambda m: m.__name__)
def test_required_keys_and_numbers_in_the_tables_are_those_of_the_code(model: type[BaseModel]) -> None:
    for name, default, _ in _rows("recipe.md", model.__name__):
        for key in re.findall(r"`([^`]+)`", name):
            field = model.model_fields[key]
            assert (default == "required") == field.is_required(), key
            if re.fullmatch(r"[\d.e-]+", default):
                value = Train().num_epochs if key == "epochs" else field.default
                assert float(default) == value, key
            elif re.fullmatch(r"`\w+`", default) and field.default is not None:
                assert default.strip("`") == str(field.default).lower(), key


def test_metrics_are_named_in_their_order() -> None:
    table = {row[0].strip("`"): tuple(re.findall(r"`([^`]+)`", row[1])) for row in _rows("recipe.md", "Metrics")}
    assert table == METRICS


def test_exit_codes_are_those_of_the_code() -> None:
    codes = {int(row[0]) for row in _rows("run-directory.md", "Exit codes")}
    assert codes == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_the_outcome_has_the_keys_that_are_promised() -> None:
    row = next(row for row in _rows("run-directory.md", "The run directory") if "`outcome.json`" in row[0])
    keys = set(re.findall(r"`(\w+)`", row[1])) - {"eval_accuracy"}
    assert {"outcome", "global_step", "metrics", "samples_per_second", "seconds", "attempts"} <= keys
    assert keys <= Outcome.model_fields.keys() | Outcome.model_computed_fields.keys()


def test_the_run_directory_is_described_as_the_module_does() -> None:
    described = " ".join(row[0] for row in _rows("run-directory.md", "The run directory"))
    source = ast.get_docstring(ast.parse((ROOT / "src/afina/run/directory.py").read_text("utf-8"))) or ""
    files = set(re.findall(r"\b(\w+\.(?:jsonl?|yaml|argv|parquet))\b", source)) - {"env.json"}
    assert len(files) >= 8
    for file in files:
        assert f"`{file}`" in described, file


def test_site_variables_are_all_described() -> None:
    page = (ROOT / "docs/site.md").read_text("utf-8")
    example = (ROOT / "slurm/site.example.env").read_text("utf-8")
    for name in [*re.findall(r"\b(?:AFINA|SBATCH)_[A-Z]+\b", example), *CACHE_VARIABLES]:
        assert f"`{name}`" in page or name == "SBATCH_QOS", name


def test_messages_in_the_troubleshooting_table_are_in_the_source() -> None:
    source = "\n".join(p.read_text("utf-8") for p in (ROOT / "src").rglob("*.py"))
    flat = re.sub(r"\{[^{}]*\}", "…", re.sub(r'"\s*f?"', "", source))
    rows = _rows("troubleshooting.md", "Error messages")
    assert len(rows) >= 10
    for row in rows:
        for message in re.findall(r"`([^`]+)`", row[0]):
            for piece in message.split("…"):
                assert piece.strip() in flat or message in ("UNKNOWN",), message


def test_the_recipe_on_the_page_is_read() -> None:
    recipes = [text for _, text in _blocks("yaml")]
    assert len(recipes) == 1
    assert parse_recipe(recipes[0]).name == "amazon-stars"


def test_python_blocks_use_what_exists() -> None:
    blocks = [text for _, text in _blocks("python")]
    assert blocks
    for text in blocks:
        tree = ast.parse(text)
        names: dict[str, Any] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None
                for alias in node.names:
                    package = importlib.import_module(node.module)
                    names[alias.name] = getattr(package, alias.name, None) or importlib.import_module(
                        f"{node.module}.{alias.name}"
                    )
        assert names
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in names:
                    assert hasattr(names[node.value.id], node.attr), ast.unparse(node)
                elif node.value.id == "run":
                    assert hasattr(importlib.import_module("afina.watch.handle").Run, node.attr), ast.unparse(node)


def test_no_page_has_marks_of_a_conflict() -> None:
    assert not [
        page.name
        for page in PAGES
        if re.search(r"^(<<<<<<<|=======|>>>>>>>)( |$)", page.read_text("utf-8"), re.MULTILINE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text("utf-8"))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"(?m)^#+ (.+)$", _FENCE.sub("", file.read_text("utf-8")))
            slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{page.name}: {target}"


def test_every_page_is_in_the_contents_of_the_site() -> None:
    """Sphinx refuses a page outside of every toctree; this fails sooner."""
    contents = " ".join(text for kind, text in _FENCE.findall((ROOT / "docs/index.md").read_text("utf-8")))
    assert {page.stem for page in PAGES if page.parent == ROOT / "docs"} - {"index"} <= set(contents.split())


#: Dotted names of the package in running text; not in paths, and not behind another name.
_DOTTED = re.compile(r"(?<![\w./:-])(?:afina|worker)(?:\.[A-Za-z_]\w*)+(?![\w/])")
_FILES = {"sif", "json", "argv", "sh"}


def _prose(path: Path) -> Iterator[str]:
    """The text of a page; the comments and docstrings of a module."""
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        yield text
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        missing = object()
        for part in parts[end:]:
            value = getattr(value, part, missing)
        return value is not missing
    return False


def test_dotted_names_of_modules_exist() -> None:
    """In docstrings, comments and pages: a module that was moved takes its mentions along."""
    labels = set(re.findall(r"\bprintf '(afina\.\w+)", (ROOT / "Apptainer.def").read_text("utf-8")))
    assert "afina.torch" in labels, "labels of the image are no modules"
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    named: dict[str, set[str]] = {}
    for path in [*PAGES, *sources]:
        for text in _prose(path):
            for name in _DOTTED.findall(text):
                named.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    assert len(named) > 40
    gone = {n: sorted(p) for n, p in named.items() if n.rpartition(".")[2] not in _FILES and n not in labels}
    assert {name: paths for name, paths in gone.items() if not _resolves(name)} == {}


def test_a_module_that_is_gone_does_not_resolve() -> None:
    assert _resolves("afina.worker.compute.packing.pack") and _resolves("afina.site.gpus")
    assert not _resolves("afina.doctor_job") and not _resolves("afina.site.gpus.nothing")


def _rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    section = re.split(
        r"(?m)^#+ ", text.split(f"# {heading}\n" if f"# {heading}\n" in text else "# The recipe\n", 1)[1]
    )[0]
    if heading == "Recipe":
        section = re.split(r"(?m)^#+ ", text.split("\n## Recipe\n", 1)[1])[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    # A bar inside code is not a border.
    rows = [re.split(r"(?<!`\")\|(?!\"`)", line.strip().strip("|")) for line in lines[2:]]
    assert rows, f"no table under {heading} in {page}"
    return [[cell.strip() for cell in row] for row in rows]


def test_the_page_of_the_site_names_every_variable() -> None:
    sources = [*(ROOT / "src/afina").rglob("*.py"), *(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "slurm").glob("*.sh")]
    used = {name for path in sources for name in re.findall(r"\bAFINA_[A-Z_]*[A-Z]\b", path.read_text("utf-8"))}
    page = (ROOT / "docs/site.md").read_text("utf-8")
    assert not {name for name in used if f"`{name}`" not in page and f"`_{name}`" not in page}
