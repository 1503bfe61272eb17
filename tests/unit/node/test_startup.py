"""Hidden packages and the paused garbage collector, and that both come back."""

from __future__ import annotations

import gc
import subprocess
import sys

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


def test_evaluate_is_imported_without_its_evaluators_and_has_them_when_asked() -> None:
    """In a process of its own; the first evaluation of a run loads no statistics of SciPy."""
    code = """
import sys
from afina.worker.task.scoring import compute_metrics
import evaluate, numpy
labels = numpy.array([0, 1, 1, 2])
found = compute_metrics("single-label", ["accuracy", "f1"], labels, labels, 3)
assert found["accuracy"] == found["f1"] == 1.0, found
assert not {"scipy.stats", "evaluate.evaluator"} & sys.modules.keys()
assert evaluate.TextClassificationEvaluator.__module__ == "evaluate.evaluator.text_classification"
assert callable(evaluate.evaluator) and callable(evaluate.EvaluationSuite) and callable(evaluate.load)
assert not hasattr(evaluate, "Evaluators")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.series
def test_an_adapter_does_not_import_bitsandbytes() -> None:
    """In a process of its own; two seconds of every start."""
    code = """
import sys
from transformers import BertConfig, BertForSequenceClassification
from afina.recipe.keys.adapter_keys import Adapter
from afina.worker.model.adapters import add_adapter
small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
add_adapter(BertForSequenceClassification(small), Adapter(dora=True))
assert "peft" in sys.modules and "bitsandbytes" not in sys.modules
import bitsandbytes
"""
    subprocess.run([sys.executable, "-c", code], check=True)
