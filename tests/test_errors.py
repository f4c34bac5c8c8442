"""Errors reach the parent process whole."""

from __future__ import annotations

import pickle

import pytest

from paroquant_stream import errors

CLASSES = [value for value in vars(errors).values() if isinstance(value, type)]


@pytest.mark.parametrize("kind", CLASSES)
def test_survives_pickling(kind):
    copy = pickle.loads(pickle.dumps(kind("what, where, and what to do")))
    assert type(copy) is kind
    assert str(copy) == "what, where, and what to do"


@pytest.mark.parametrize("kind", CLASSES)
def test_has_the_common_base_and_says_what_it_is(kind):
    assert issubclass(kind, errors.ParoquantStreamError)
    assert kind.__doc__
