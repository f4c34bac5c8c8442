"""Errors: they can be pickled, and each has one of four bases."""

from __future__ import annotations

import pickle

import pytest

from paroquant_stream import errors

CLASSES = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind):
    copy = pickle.loads(pickle.dumps(kind("what, where, and what to do")))
    assert type(copy) is kind
    assert str(copy) == "what, where, and what to do"


def test_the_errors_of_several_models_survive_pickling():
    failures = {"a": errors.PlanError("one"), "b": errors.StoreError("two")}
    copy = pickle.loads(pickle.dumps(errors.SomeModelsFailedError("2 of 3", failures)))
    assert str(copy) == "2 of 3"
    assert {name: (type(e), str(e)) for name, e in copy.failures.items()} == {
        "a": (errors.PlanError, "one"),
        "b": (errors.StoreError, "two"),
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_has_one_of_the_four_bases(kind):
    bases = {errors.CheckpointError, errors.StoreError, errors.ModelError, errors.ExecutionError}
    assert kind is errors.ParoquantStreamError or len(bases & set(kind.__mro__)) == 1
    assert kind.__name__.endswith("Error")
    assert kind.__doc__
