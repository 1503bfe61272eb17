"""The modulefile and the form of Open OnDemand, read against the batch script, the variables of a site and this version. Their own programs: not here."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tests.common import NASTY, ROOT, program

from afina import __version__
from afina.site.variables import KNOWN

SLURM = ROOT / "slurm"
FORM = SLURM / "ondemand"


def load(text: str) -> Any:
    return YAML(typ="safe").load(text)


def render(text: str, values: dict[str, str]) -> str:
    """ERB for the two kinds of tags that the files have: a value, quoted for a shell or not."""

    def value(match: re.Match[str]) -> str:
        text = values[match["name"]]
        if match["folder"]:
            text = text.rpartition("/")[0]
        return shlex.quote(text) if match["quoted"] else text

    tag = r"<%= (?:context\.)?(?P<name>\w+)(?P<folder>\.rpartition\(\"/\"\)\.first)?(?P<quoted>\.shellescape)? %>"
    rendered = re.sub(tag, value, text)
    assert "<%" not in rendered
    return rendered


def test_the_modulefile_sets_what_afina_reads() -> None:
    text = (SLURM / "modulefile").read_text()
    assert text.startswith("#%Module1.0\n") and f"afina/{__version__} " in text
    variables = re.findall(r"^(?:setenv|pushenv)\s+(\w+)", text, re.M)
    assert variables == ["AFINA_SITE"] and not set(variables) & set(KNOWN)
    defined = set(re.findall(r"^set (\w+)", text, re.M))
    assert set(re.findall(r"\$(\w+)", re.sub(r"(?m)^#.*", "", text))) <= defined
    (help_text,) = re.findall(r'puts stderr "(.*)"', text)
    assert re.findall(r"afina (\w+)", help_text) == ["init", "doctor", "submit"]


def test_the_form_asks_for_what_the_job_uses() -> None:
    form = load((FORM / "form.yml").read_text())
    assert set(form["form"]) == set(form["attributes"]), "each attribute is shown"
    templates = (FORM / "submit.yml.erb").read_text() + (FORM / "template/script.sh.erb").read_text()
    assert set(re.findall(r"<%= (?:context\.)?(\w+)", templates)) == set(form["form"])
    manifest = load((FORM / "manifest.yml").read_text())
    assert (manifest["name"], manifest["role"]) == ("afina", "batch_connect")


def test_the_form_submits_with_the_options_of_the_batch_script() -> None:
    """Signal, requeueing and appending to the log are what a run depends on."""
    values = {"num_nodes": "2", "gpus_per_node": "4", "hours": "3"}
    native = load(render((FORM / "submit.yml.erb").read_text(), values))["script"]["native"]
    script = re.findall(r"^#SBATCH (--\S+)", (SLURM / "finetune.sbatch").read_text(), re.M)
    fixed = {line for line in script if line.startswith(("--requeue", "--open-mode", "--signal", "--ntasks-per-node"))}
    assert len(fixed) == 4 and fixed <= set(native)
    assert {"--nodes=2", "--gpus-per-node=4", "--time=3:00:00"} == set(native) - fixed


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("overrides", ["", "name=a b; c"])
def test_the_forms_job_starts_the_batch_script(tmp_path: Path, name: str, overrides: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    program(folder, "finetune.sbatch", 'printf "%s\\0" "$PWD" "$@"\n')
    values = {"slurm_folder": str(folder), "recipe": f"{folder}/recipe.yaml", "overrides": overrides}
    script = render((FORM / "template/script.sh.erb").read_text(), values)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not list(tmp_path.rglob("pwned")), done
    expected = [str(folder), f"{folder}/recipe.yaml", *(["--set", overrides] if overrides else [])]
    assert done.stdout.split("\0")[:-1] == expected
