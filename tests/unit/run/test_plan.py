from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from tests.unit.conftest import DROP, recipe_dict

from afina import __version__
from afina.errors import DataError, InputError, RecipeError
from afina.formats.read_options import DATA_SUFFIXES
from afina.prediction.request import Prediction
from afina.recipe.schema import Recipe
from afina.run.job_request import JobRequest
from afina.run.plan import Plan, geometry_for, load_plan, make_plan
from afina.site.settings import Site
from afina.version import INTERFACE

Load = Callable[..., Recipe]


def files(given: Any, base: Path, site: Site) -> dict[str, list[str]]:
    """The files that `data.files` finds beside a recipe in `base`, relative to it where they are below it."""
    loaded = Recipe.model_validate(recipe_dict(data__files=given))
    found = make_plan(loaded, site, recipe_file=base / "recipe.yaml").files
    return {
        part: [str(p.relative_to(base)) if p.is_relative_to(base) else str(p) for p in paths]
        for part, paths in found.items()
    }


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text,stars\na,1\n")
    return folder


# -- geometry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "nodes", "gpus", "limit", "per_device", "accumulation"),
    [
        (8, 1, 1, None, 8, 1),
        (8, 1, 2, None, 4, 1),
        (8, 2, 2, None, 2, 1),
        (8, 2, 4, None, 1, 1),
        (8, 1, 0, None, 8, 1),
        (8, 2, 0, None, 4, 1),
        (32, 1, 1, 8, 8, 4),
        (32, 1, 1, 7, 4, 8),
        (32, 1, 1, 1, 1, 32),
        (32, 2, 4, 3, 2, 2),
        (30, 1, 1, 8, 6, 5),
        (31, 1, 1, 8, 1, 31),
        (8, 1, 1, 100, 8, 1),
        (1, 1, 1, None, 1, 1),
        (1024, 16, 8, 8, 8, 1),
    ],
)
def test_geometry(
    recipe: Load, site: Site, batch: int, nodes: int, gpus: int, limit: int | None, per_device: int, accumulation: int
) -> None:
    loaded = recipe(
        train__batch_size=batch, train__max_batch_per_device=limit, resources={"nodes": nodes, "gpus_per_node": gpus}
    )
    g = make_plan(loaded, site, recipe_file=loaded_from()).geometry
    assert (g.batch_per_device, g.accumulation) == (per_device, accumulation)
    assert g.batch_per_device * g.accumulation * g.num_processes == g.global_batch == batch
    assert g.num_processes == loaded.resources.num_processes == nodes * max(1, gpus)
    assert limit is None or g.batch_per_device <= limit


def loaded_from() -> Path:
    """A recipe file in the working directory, with the data that the recipe names."""
    put(Path.cwd(), "reviews.csv")
    return Path("recipe.yaml")


@pytest.mark.parametrize(
    ("batch", "nodes", "gpus", "nearest"),
    [(8, 1, 3, "6 or 9"), (10, 2, 4, "8 or 16"), (3, 2, 2, "4"), (1, 1, 2, "2"), (100, 3, 1, "99 or 102")],
)
def test_a_batch_that_does_not_divide_names_the_sizes_that_do(
    recipe: Load, site: Site, batch: int, nodes: int, gpus: int, nearest: str
) -> None:
    loaded = recipe(train__batch_size=batch, resources={"nodes": nodes, "gpus_per_node": gpus})
    with pytest.raises(RecipeError) as caught:
        geometry_for(loaded, gpus)
    assert (
        f"train.batch_size: {batch} is the global batch and does not divide over {nodes * gpus}" in caught.value.message
    )
    assert caught.value.remedy.startswith(f"set train.batch_size to {nearest}, ")
    for size in nearest.split(" or "):
        geometry_for(recipe(train__batch_size=int(size), resources=loaded.resources.model_dump()), gpus)


def test_a_request_overrides_the_resources(recipe: Load, site: Site, recipe_file: Callable[..., Path]) -> None:
    loaded = recipe(resources={"cpus_per_gpu": 3})
    plan = make_plan(loaded, site, JobRequest(nodes=2, gpus_per_node=4, time_min=5), recipe_file=recipe_file())
    assert (plan.geometry.num_processes, plan.geometry.batch_per_device, plan.geometry.cpus_per_process) == (8, 1, 3)
    assert (plan.recipe.resources.nodes, plan.recipe.resources.time) == (2, 5)
    local = make_plan(recipe(), site, JobRequest(num_processes=2, gpus_per_node=0), recipe_file=recipe_file())
    assert (local.geometry.num_processes, local.geometry.gpus_per_node) == (2, 0)


@pytest.mark.parametrize(
    "wrong", [{"nodes": 0}, {"nodes": -1}, {"gpus_per_node": -2}, {"time_min": 0}, {"nodes": True}]
)
def test_a_request_is_checked_like_the_recipe(
    recipe: Load, site: Site, recipe_file: Callable[..., Path], wrong: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="must be a whole number"):
        make_plan(recipe(), site, JobRequest(**wrong), recipe_file=recipe_file())


# -- data files --------------------------------------------------------------------------------------------------------


def test_beside_the_recipe_then_in_the_working_directory(tmp_path: Path, site: Site) -> None:
    base = tmp_path / "b"
    put(Path.cwd(), "only here.csv", "both.csv")
    put(base, "both.csv", "sub/deep.tsv")
    assert files("both.csv", base, site) == {"all": ["both.csv"]}
    assert files("only here.csv", base, site) == {"all": [str(Path.cwd() / "only here.csv")]}
    assert files("sub/deep.tsv", base, site) == {"all": ["sub/deep.tsv"]}
    assert files(str(base / "both.csv"), tmp_path, site) == {"all": ["b/both.csv"]}
    assert files("./sub/../both.csv", base, site)["all"] == ["sub/../both.csv"]


def test_home_and_variables(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    put(Path(os.environ["HOME"]), "mine.csv")
    monkeypatch.setenv("DATA", str(put(tmp_path / "da ta", "d.csv")))
    assert files("~/mine.csv", tmp_path, site)["all"] == ["ho me's/mine.csv"]
    assert files("$DATA/d.csv", tmp_path, site)["all"] == ["da ta/d.csv"]
    assert files("${DATA}/*.csv", tmp_path, site)["all"] == ["da ta/d.csv"]


def test_lists_globs_and_folders(tmp_path: Path, site: Site) -> None:
    base = put(
        tmp_path / "b", "a1.csv", "a2.csv", "b.jsonl", "notes.txt", "dir/x.parquet", "dir/.hidden.csv", "dir/y.md"
    )
    assert files("a*.csv", base, site) == {"all": ["a1.csv", "a2.csv"]}
    assert files(["b.jsonl", "a?.csv"], base, site) == {"all": ["b.jsonl", "a1.csv", "a2.csv"]}
    assert files(["a1.csv", "a*.csv", "a1.csv"], base, site) == {"all": ["a1.csv", "a2.csv"]}
    assert files({"train": "a*.csv", "eval": "b.jsonl", "test": "dir"}, base, site) == {
        "train": ["a1.csv", "a2.csv"],
        "eval": ["b.jsonl"],
        "test": ["dir/x.parquet"],
    }
    assert files("dir", base, site) == files("dir/", base, site) == {"all": ["dir/x.parquet"]}


def test_a_folder_of_parts(tmp_path: Path, site: Site) -> None:
    base = put(
        tmp_path / "b", "p/train.csv", "p/validation.csv", "p/test-00000-of-00002.csv", "p/test-00001-of-00002.csv"
    )
    assert files("p", base, site) == {
        "train": ["p/train.csv"],
        "eval": ["p/validation.csv"],
        "test": ["p/test-00000-of-00002.csv", "p/test-00001-of-00002.csv"],
    }
    assert files("p/", base, site) == files("p", base, site)
    put(base, "whole/one.csv", "whole/two.csv")
    assert files("whole", base, site) == {"all": ["whole/one.csv", "whole/two.csv"]}


def test_a_folder_that_mixes_parts_and_others_is_refused(tmp_path: Path, site: Site) -> None:
    base = put(tmp_path / "b", "p/train.csv", "p/test.csv", "p/more.csv")
    with pytest.raises(DataError) as caught:
        files("p", base, site)
    assert "holds test.csv, which is test, and more.csv, which is not named after a split" in caught.value.message
    assert "name the files of each split" in caught.value.remedy


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
def test_formats(tmp_path: Path, site: Site, suffix: str) -> None:
    name = f"a{suffix.upper()}"
    assert files(name, put(tmp_path / "b", name), site) == {"all": [name]}


def test_nasty_data_files_and_folders(tmp_path: Path, site: Site, nasty: str) -> None:
    base = put(tmp_path / "base [of] it's" / nasty, f"{nasty}.csv", f"d/{nasty}/one.csv")
    assert files({"all": f"{nasty}.csv"}, base, site) == {"all": [f"{nasty}.csv"]}
    assert files({"train": f"d/{nasty}"}, base, site) == {"train": [f"d/{nasty}/one.csv"]}
    assert files("d/*/o*.csv", base, site) == {"all": [f"d/{nasty}/one.csv"]}


@pytest.mark.parametrize(
    ("given", "message", "remedy"),
    [
        ("review.csv", "data.files.all: {base}/review.csv: no such file", "did you mean `reviews.csv`?"),
        ({"train": "zzz"}, "data.files.train: {base}/zzz: no such file", "looked up beside the recipe, then in"),
        ("*.parquet", "data.files.all: {base}/*.parquet: no such file", "looked up beside the recipe"),
        ("notes.txt", "data.files.all: {base}/notes.txt: format .txt is not known", "known formats: .csv, .tsv"),
        ("README", "data.files.all: {base}/README: format (no suffix) is not known", "known formats"),
        ("empty", "data.files.all: {base}/empty: no data file in this folder", "known formats"),
        (
            "~no_such_user/x.csv",
            "data.files.all: {base}/~no_such_user/x.csv: no such file",
            "looked up beside the recipe",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, site: Site, given: Any, message: str, remedy: str) -> None:
    base = put(tmp_path / "b", "reviews.csv", "notes.txt", "README")
    (base / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        files(given, base, site)
    assert caught.value.message == message.format(base=base)
    assert remedy in caught.value.remedy


def test_a_dangling_link_is_no_file(tmp_path: Path, site: Site) -> None:
    base = put(tmp_path / "b", "other.txt")
    (base / "gone.csv").symlink_to(base / "nowhere.csv")
    with pytest.raises(DataError, match="no such file"):
        files("gone.csv", base, site)


def test_paths_that_are_not_utf8_are_refused(tmp_path: Path, site: Site) -> None:
    base = tmp_path / "b"
    base.mkdir()
    Path(os.fsdecode(os.fsencode(base) + b"/caf\xe9.csv")).write_text("text,stars\n")
    with pytest.raises(InputError, match="this path is not UTF-8"):
        files("*.csv", base, site)
    with pytest.raises(InputError, match="this path is not UTF-8"):
        put(base, "a.csv")
        make_plan(
            Recipe.model_validate(recipe_dict(data__files=str(base / "a.csv"))),
            Site(scratch=Path(os.fsdecode(b"/caf\xe9"))),
        )


# -- model -------------------------------------------------------------------------------------------------------------


def model(given: str, site: Site, base: Path) -> Path | None:
    put(base, "reviews.csv")
    return make_plan(
        Recipe.model_validate(recipe_dict(model=given)), site, recipe_file=base / "recipe.yaml"
    ).model_folder


def test_model_folders(tmp_path: Path, site: Site, model_folder: Path) -> None:
    assert model(str(model_folder), site, tmp_path) == model_folder
    assert model(model_folder.name, site, tmp_path) == model_folder
    assert model(f"./{model_folder.name}", site, tmp_path / "elsewhere" / "..") is not None
    assert model("google-bert/bert-base-cased", site, tmp_path) is None
    assert model("gpt2", site, tmp_path) is None
    for name in ("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (model_folder / "model.safetensors").unlink(missing_ok=True)
        (model_folder / name).write_text("{}")
        assert model(str(model_folder), site, tmp_path) == model_folder
        (model_folder / name).unlink()


def test_model_folders_that_are_refused(tmp_path: Path, site: Site, model_folder: Path) -> None:
    def why(given: str) -> InputError:
        with pytest.raises(InputError) as caught:
            model(given, site, tmp_path)
        assert caught.value.remedy
        return caught.value

    weights = model_folder / "model.safetensors"
    assert "is a file" in why(str(weights)).message
    weights.unlink()
    assert why(str(model_folder)).message == (
        f"model: {model_folder} has no weights (model.safetensors, model.safetensors.index.json)"
    )
    assert "download the model again" in why(str(model_folder)).remedy
    (model_folder / "config.json").unlink()
    assert "has no config.json" in why(str(model_folder)).message
    for given in ("./mo dle", "/not/there/at/all", "~/absent", "$HOME/absent", "a/b/c"):
        assert "no such folder" in why(given).message
    assert why("./mo dle").remedy == "did you mean `mo del`?"


# -- JSON and digest ---------------------------------------------------------------------------------------------------


def full_plan(recipe: Load, site: Site, recipe_file: Callable[..., Path], model_folder: Path, **changes: Any) -> Plan:
    changes = {"model": str(model_folder), "resources": {"time": "1:30:00", "mem_gb": 3}, **changes}
    return make_plan(recipe(**changes), site, recipe_file=recipe_file(**changes))


def test_json_round_trip_is_identity(
    recipe: Load, scratch: Path, recipe_file: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    site = Site(
        scratch=scratch, image=tmp_path / "i.sif", runtime="apptainer", binds=("/a:/b",), sbatch={"SBATCH_QOS": "é\n"}
    )
    plan = full_plan(recipe, site, recipe_file, model_folder, train__arguments={"a": [1, {"b": None}], "c": "☃"})
    again = Plan.model_validate_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json() and again.digest == plan.digest
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json(), encoding="utf-8")
    assert load_plan(file) == plan


def test_every_path_of_a_plan_is_absolute(
    recipe: Load, site: Site, recipe_file: Callable[..., Path], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file()
    monkeypatch.chdir(path.parent)
    plan = make_plan(recipe(model=f"../{model_folder.name}"), site, recipe_file=path.name)
    assert plan.recipe_file == path and plan.files == {"all": (path.parent / "reviews.csv",)}
    assert plan.model_folder is not None and plan.model_folder.is_absolute()


def test_the_digest_is_of_what_is_trained(
    recipe: Load, site: Site, recipe_file: Callable[..., Path], model_folder: Path
) -> None:
    def digest(**changes: Any) -> str:
        return full_plan(recipe, site, recipe_file, model_folder, **changes).digest

    same = digest()
    assert len(same) == 64
    assert digest(name="other") == same
    assert digest(resources={"nodes": 2, "gpus_per_node": 4, "time": 5}) == same
    assert full_plan(recipe, Site(scratch=Path("/elsewhere")), recipe_file, model_folder).digest == same
    changed = {
        digest(train__seed=9),
        digest(train__learning_rate=1e-4),
        digest(train__arguments={"weight_decay": 0.02}),
        digest(tokens__max_length=64),
        digest(data__text="body"),
        digest(data__train={"fraction": 0.7}),
        digest(metrics=["accuracy"]),
        digest(model="gpt2"),
    }
    assert len(changed) == 8 and same not in changed


def test_metrics_of_ones_own_travel_in_the_plan(
    recipe: Load, site: Site, recipe_file: Callable[..., Path], model_folder: Path
) -> None:
    plain = full_plan(recipe, site, recipe_file, model_folder)
    file = recipe_file().parent / "costs.py"
    file.write_text("def total(labels, predictions):\n    return 1\n", encoding="utf-8")
    metrics = ["accuracy", "costs:total:lower", "sklearn.metrics:hamming_loss"]
    plan = full_plan(recipe, site, recipe_file, model_folder, metrics=metrics)
    assert plan.metric_code == {"costs": file.read_text()} and load_json(plan) == plan
    file.write_text("def total(labels, predictions):\n    return 2\n", encoding="utf-8")
    assert full_plan(recipe, site, recipe_file, model_folder, metrics=metrics).digest != plan.digest
    assert full_plan(recipe, site, recipe_file, model_folder).digest == plain.digest and plain.metric_code == {}


def load_json(plan: Plan) -> Plan:
    return Plan.model_validate_json(plan.to_json())


def test_key_order_does_not_change_the_digest(site: Site, recipe: Load, recipe_file: Callable[..., Path]) -> None:
    one = recipe(train__arguments={"a": 1, "b": 2})
    two = recipe(train__arguments={"b": 2, "a": 1})
    path = recipe_file()
    assert make_plan(one, site, recipe_file=path).digest == make_plan(two, site, recipe_file=path).digest


@pytest.mark.parametrize("text", ["", "{", "[]", '{"afina_version": 1}', "\xff"])
def test_plans_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        load_plan(file)
    assert f"{file}: not a plan of afina {__version__}" in caught.value.message and caught.value.remedy


def test_a_folder_without_a_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run directory, it has no plan\.json"):
        load_plan(tmp_path / "plan.json")


def test_a_plan_refuses_what_it_does_not_know(recipe: Load, site: Site, recipe_file: Callable[..., Path]) -> None:
    plan = json.loads(make_plan(recipe(), site, recipe_file=recipe_file()).to_json())
    with pytest.raises(ValueError, match="newer_key"):
        Plan.model_validate({**plan, "newer_key": 1})


def test_planning_changes_nothing(tmp_path: Path, recipe: Load, site: Site, recipe_file: Callable[..., Path]) -> None:
    from tests.unit.conftest import tree

    path = recipe_file()
    loaded, before = recipe(), None
    before = tree(tmp_path)
    make_plan(loaded, site, recipe_file=path)
    assert tree(tmp_path) == before
    assert DROP not in json.dumps(recipe_dict())


# -- what crosses into the image ---------------------------------------------------------------------------------------


def shape(model: type[BaseModel]) -> dict[str, list[str]]:
    """The keys of a model and of those below it; a key with a default ends in `?`."""
    shapes, waiting = dict[str, list[str]](), [model]
    while waiting:
        one = waiting.pop()
        if isinstance(one, type) and issubclass(one, BaseModel):
            if one.__name__ not in shapes:
                shapes[one.__name__] = sorted(
                    f"{n}{'' if f.is_required() else '?'}" for n, f in one.model_fields.items()
                )
                waiting += [f.annotation for f in one.model_fields.values() if f.annotation is not None]
        else:
            waiting += get_args(one)
    return dict(sorted(shapes.items()))


def test_a_changed_plan_is_another_interface() -> None:
    """An image refuses plans with keys that it does not know: then `INTERFACE` must be another one, which the host compares first.

    To accept a change: raise INTERFACE in src/afina/version.py, and put the new digest here.
    """
    text = json.dumps([shape(Plan), shape(Prediction)])
    assert {"Train", "Geometry", "Site"} <= shape(Plan).keys()
    assert (INTERFACE, hashlib.sha256(text.encode()).hexdigest()[:12]) == (11, "67f6f6bb78c2")
