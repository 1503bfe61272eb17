"""What starting up does without, and that it is put back."""

from __future__ import annotations

import gc

import pytest
import transformers.utils

from afina.worker.startup import uncollected, without


def test_the_collector_rests_inside_and_works_again_after_it() -> None:
    assert gc.isenabled()
    with without("scipy"):
        assert not gc.isenabled() and not transformers.utils.is_scipy_available()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled(), "it was the outer one that stopped it"
    assert gc.isenabled() and transformers.utils.is_scipy_available()
    with pytest.raises(ZeroDivisionError), uncollected():
        1 / 0  # noqa: B018
    assert gc.isenabled()


def test_a_package_that_transformers_does_not_ask_for_is_no_error() -> None:
    with without("never_heard_of"):
        assert not hasattr(transformers.utils, "is_never_heard_of_available")
