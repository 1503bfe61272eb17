from __future__ import annotations

import json
import pickle

import pytest

from afina import errors
from afina.errors import AfinaError, nearest

KINDS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, AfinaError)]

CODES = {
    "InputError": 2,
    "RecipeError": 2,
    "DataError": 2,
    "ClaimedError": 2,
    "EnvironmentProblem": 3,
    "SiteError": 3,
    "HubError": 3,
    "SlurmError": 3,
    "TrainingError": 4,
}


def test_every_error_has_the_exit_code_of_the_contract() -> None:
    assert {k.__name__: k.exit_code for k in KINDS if k is not AfinaError} == CODES
    assert (errors.EXIT_FINISHED, errors.EXIT_STOPPED) == (0, 75)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = [line.split("──")[-1].split()[0] for line in (errors.__doc__ or "").splitlines() if "──" in line]
    assert sorted(drawn) == sorted(CODES)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling_and_json(kind: type[AfinaError]) -> None:
    error = kind("what is wrong ☃", "what to do")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error) == "what is wrong ☃\n  remedy: what to do"
    assert json.loads(error.to_json()) == {
        "error": kind.__name__,
        "message": "what is wrong ☃",
        "remedy": "what to do",
    }


def test_no_remedy_no_line() -> None:
    assert str(AfinaError("only this")) == "only this"


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("lable", ["label", "labels"], "did you mean `label`?"),
        ("Epochs", ["epochs", "seed"], "did you mean `epochs`?"),
        ("STARS", ["stars"], "did you mean `stars`?"),
        ("zzz", ["label"], ""),
        ("a", [], ""),
        ("", ["label"], ""),
    ],
)
def test_nearest(name: str, known: list[str], expected: str) -> None:
    assert nearest(name, known) == expected
