from __future__ import annotations

import json
import pickle

import pytest

from afina import errors
from afina.errors import AfinaError, EnvironmentProblem, Failure, nearest
from afina.run.outcome import Outcome

KINDS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, AfinaError)]

CODES = {
    "InputError": 2, "RecipeError": 2, "DataError": 2, "ClaimedError": 2, "EnvironmentProblem": 3, "SiteError": 3,
    "HubError": 3, "SlurmError": 3, "TrainingError": 4, "Failed": 4, "Stopped": 75, "Cancelled": 75,
    "WaitTimeout": 75,
}  # fmt: skip


def test_every_error_has_the_exit_code_of_the_contract() -> None:
    assert {k.__name__: k.exit_code for k in KINDS if k is not AfinaError} == CODES
    assert (errors.EXIT_FINISHED, errors.EXIT_STOPPED) == (0, 75)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = [line.split("──")[-1].split()[0] for line in (errors.__doc__ or "").splitlines() if "──" in line]
    assert sorted(drawn) == sorted(CODES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["pickle", "json", "outcome"])
def test_errors_keep_all_parts_on_every_way(kind: type[AfinaError], way: str) -> None:
    error = kind("what is wrong ☃", "what to do", cause="disk", nodes=("n1", "n2"))
    again: AfinaError
    if way == "pickle":
        again = pickle.loads(pickle.dumps(error))
    elif way == "json":
        again = Failure.from_dict(json.loads(json.dumps({**error.failure.to_dict(), "newer": 1}))).error()
    else:
        outcome = Outcome(outcome="failed", exit_code=error.exit_code, attempt="1.0", failure=error.failure)
        read = Outcome.model_validate_json(outcome.model_dump_json())
        assert read == outcome and read.failure is not None and read.cause == "disk"
        again = read.failure.error()
    assert type(again) is kind and again.failure == error.failure and again.failure.exit_code == kind.exit_code
    assert str(again) == "what is wrong ☃\n  remedy: what to do"


def test_the_error_of_an_older_outcome_becomes_its_failure() -> None:
    """outcome.json of an afina before 0.2 holds the text alone; this one writes it too, for older readers."""
    old = {"outcome": "failed", "exit_code": 3, "attempt": "1.0", "cause": "disk", "error": "full\n  remedy: free it"}
    outcome = Outcome.model_validate(old)
    assert outcome.failure == Failure("EnvironmentProblem", "full\n  remedy: free it", cause="disk")
    assert {**outcome.model_dump(), **old} == outcome.model_dump()


def test_an_unknown_kind_is_a_plain_error() -> None:
    error = Failure("OfTomorrow", "what is wrong").error()
    assert type(error) is AfinaError and error.exit_code == 1


def test_another_message_keeps_kind_remedy_and_cause() -> None:
    error = EnvironmentProblem("no room", "free some", cause="disk").about("cell a")
    assert error.failure == Failure("EnvironmentProblem", "cell a: no room", "free some", "disk")


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
