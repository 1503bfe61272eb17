"""Secrets in a recipe, and code of others."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from tests.unit.conftest import recipe_dict
from tests.unit.recipe.refusals import BASE, refused

from afina.errors import RecipeError
from afina.recipe.keys.training_arguments import RESERVED_ARGUMENTS
from afina.recipe.parse import parse_recipe
from afina.recipe.schema import Recipe

TOKEN = "hf_" + "aBcDeFgH1jKlMnOpQrStUvWxYz012345678"[:34]


SECRET_URL = "https://me:s3cr3t-pw@hub.example.org/owner/name"


@pytest.mark.parametrize("secret", [TOKEN, SECRET_URL], ids=["token", "url"])
@pytest.mark.parametrize(
    "key",
    ["model", "revision", "data.hub", "data.id", "train.arguments.run_name", "train.batch_size", "train.arguments"],
)
def test_a_secret_is_refused_and_not_repeated(key: str, secret: str) -> None:
    value = f'{{project: ["{secret}"]}}' if key == "train.arguments" else f'"{secret}"'
    error = refused(BASE, f"{key}={value}")
    assert error.message.startswith(f"--set {key}") and "holds a token or a password" in error.message
    assert "HF_TOKEN in the environment" in error.remedy
    assert TOKEN[3:] not in str(error) and "s3cr3t-pw" not in str(error)


def test_a_secret_in_the_file_names_its_line() -> None:
    error = refused(BASE + f"  arguments:\n    weight_decay: 0.1\n    logging_name: {TOKEN}\n")
    assert error.message == "r.yaml:11: `train.arguments.logging_name`: holds a token or a password"


def test_the_hubs_token_is_not_an_argument() -> None:
    error = refused(BASE, f"train.arguments.hub_token={TOKEN}")
    assert error.remedy == "set HF_TOKEN in the environment" and TOKEN not in str(error)
    malformed = refused(BASE, f"model.sub={TOKEN}")
    assert TOKEN not in str(malformed) and "has no keys" in malformed.message


def test_a_recipe_from_python_does_not_repeat_a_secret() -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({**recipe_dict(), "model": TOKEN})
    with pytest.raises(RecipeError) as explained:
        Recipe(**{**recipe_dict(), "model": TOKEN})
    assert TOKEN not in str(caught.value) + str(explained.value)


@pytest.mark.parametrize("name", ["hf_style", "token", "a@b", "https://example.org/a@b", "hf_" + "x" * 8, "keyword"])
def test_ordinary_words_are_no_secrets(name: str) -> None:
    assert parse_recipe(BASE, [f'data.text="{name}"']).data.text == (name,)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12], COMMIT.upper(), COMMIT + "0", f"refs/pr/{COMMIT}"])
def test_foreign_code_needs_a_full_commit(revision: str) -> None:
    error = refused(BASE + f"trust_remote_code: true\nrevision: {revision}\n")
    assert error.message.startswith("r.yaml:9: `trust_remote_code`: runs code from the model's repository")
    assert f"`{revision}` can move" in error.message and "40 hex digits" in error.remedy


def test_foreign_code_that_is_pinned_or_local() -> None:
    assert parse_recipe(BASE, ["trust_remote_code=true", f"revision='{COMMIT}'"]).trust_remote_code
    for folder in ("./model", "/data/model", "~/model", "$HOME/model", "../a/b"):
        assert parse_recipe(BASE, ["trust_remote_code=true", f"model='{folder}'"]).trust_remote_code
    assert parse_recipe(BASE).trust_remote_code is False


@pytest.mark.parametrize("argument", ["per_device_train_batch_size", "num_train_epochs"])
def test_an_argument_beside_the_keys_of_train(argument: str) -> None:
    error = refused(BASE, f"train.{argument}=1")
    assert "unknown key" in error.message and error.remedy.startswith(f"{RESERVED_ARGUMENTS[argument]};")
