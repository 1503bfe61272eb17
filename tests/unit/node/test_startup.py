"""Hidden packages and the paused garbage collector, and that both come back."""

from __future__ import annotations

import gc

import pytest
import transformers.utils

from afina.worker.startup import gc_paused, hide_packages


def test_the_collector_is_paused_inside_and_works_again_afterwards() -> None:
    assert gc.isenabled()
    with hide_packages("scipy"):
        assert not gc.isenabled() and not transformers.utils.is_scipy_available()
        with gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the outer block paused it"
    assert gc.isenabled() and transformers.utils.is_scipy_available()
    with pytest.raises(ZeroDivisionError), gc_paused():
        1 / 0  # noqa: B018
    assert gc.isenabled()


def test_a_package_that_transformers_does_not_ask_for_is_no_error() -> None:
    with hide_packages("never_heard_of"):
        assert not hasattr(transformers.utils, "is_never_heard_of_available")
