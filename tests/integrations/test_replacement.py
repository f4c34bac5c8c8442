"""A function replaced under all its names, and restored under all of them."""

from __future__ import annotations

import functools
import inspect
import pickle
import sys
import types

import pytest

from paroquant_stream.integrations.replacement import Replacement

STATE = {"active": True}


def make_home(monkeypatch, function) -> types.ModuleType:
    """Make a module whose `load` is this function."""
    home = types.ModuleType("a_library")
    function.__module__, function.__qualname__ = "a_library", "load"
    home.load = function
    monkeypatch.setitem(sys.modules, "a_library", home)
    return home


def replacement(call, expected=("path",)) -> Replacement:
    STATE["active"] = True
    return Replacement("a_library", "load", expected, call, lambda: STATE["active"])


def original(path, lazy=False, **more):
    """Its documentation."""
    return ("original", path, lazy, more)


@pytest.fixture
def home(monkeypatch):
    return make_home(monkeypatch, types.FunctionType(original.__code__, {}, "load", (False,)))


def test_every_name_is_replaced_and_restored(home, monkeypatch):
    first = (home.load,)
    early, late = types.ModuleType("early"), types.ModuleType("late")
    early.load = early.under_another_name = home.load
    early.held = held = functools.partial(home.load)
    monkeypatch.setitem(sys.modules, "early", early)
    own = replacement(lambda call: "ours")
    own.apply(home)
    late.load = home.load
    monkeypatch.setitem(sys.modules, "late", late)
    assert home.load("m") == early.load("m") == early.under_another_name("m") == "ours"
    assert early.held is held
    own.restore()
    assert home.load is early.load is early.under_another_name is late.load is first[0]


def test_a_function_of_the_same_name_elsewhere_stays(home, monkeypatch):
    other = types.ModuleType("other")
    other.load = load = lambda path: "other"
    monkeypatch.setitem(sys.modules, "other", other)
    own = replacement(lambda call: "ours")
    own.apply(home)
    assert other.load is load
    own.restore()


def test_a_call_has_all_arguments_by_name(home):
    calls = []
    own = replacement(calls.append)
    own.apply(home)
    home.load("m", color="red")
    own.restore()
    assert calls[0].arguments == {"path": "m", "lazy": False}
    assert calls[0].more == {"color": "red"}
    assert calls[0].home is home


def test_a_call_is_forwarded_as_it_came_or_changed(home):
    own = replacement(lambda call: (call.forward(), call.forward(path="n")))
    own.apply(home)
    answers = home.load("m", True, color="red")
    own.restore()
    assert [answer[:3] for answer in answers] == [("original", "m", True), ("original", "n", True)]
    assert answers[1][3] == {"color": "red"}


def test_the_replaced_function_looks_like_the_original(home):
    signature, text = inspect.signature(home.load), home.load.__doc__
    own = replacement(lambda call: "ours")
    own.apply(home)
    assert inspect.signature(home.load) == signature
    assert home.load.__doc__ == text
    assert pickle.loads(pickle.dumps(home.load)) is home.load
    assert home.load.replaced_by == "paroquant_stream.integrations"
    own.restore()


def test_wrong_arguments_are_an_error_of_the_original(home):
    own = replacement(lambda call: "ours")
    own.apply(home)
    with pytest.raises(TypeError, match=r"load\(\) missing 1 required positional"):
        home.load()
    own.restore()


def test_a_kept_function_calls_the_original_when_inactive(home):
    own = replacement(lambda call: "ours")
    own.apply(home)
    kept = home.load
    own.restore()
    STATE["active"] = False
    assert kept("m", lazy=True)[:3] == ("original", "m", True)


def test_what_another_program_put_there_later_stays(home):
    own = replacement(lambda call: "ours")
    own.apply(home)
    home.load = other = lambda: None
    own.restore()
    assert home.load is other


def test_it_can_be_applied_again_and_to_a_reloaded_module(home, monkeypatch):
    own = replacement(lambda call: "ours")
    first = home.load
    own.apply(home)
    ours = home.load
    own.apply(home)
    assert home.load is ours
    own.restore()
    own.apply(home)
    assert home.load is ours
    home.load = second = types.FunctionType(original.__code__, {}, "load", (False,))
    own.apply(home)
    assert home.load("m") == "ours"
    other = types.ModuleType("other")
    other.load = ours
    monkeypatch.setitem(sys.modules, "other", other)
    own.restore()
    assert home.load is second
    assert other.load is first


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (lambda model, revision: 0, "it takes (model, revision), without path"),
        (None, "there is no such function"),
        (type("Odd", (), {"__call__": len, "__signature__": 1})(), "its parameters are unknown"),
    ],
)
def test_another_function_stays_with_one_warning(home, caplog, found, problem):
    home.load = found
    own = replacement(lambda call: "ours")
    own.apply(home)
    own.apply(home)
    assert home.load is found
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "a_library (of unknown version): a_library.load is not replaced" in record.message
    assert problem in record.message


def test_a_lazy_module_is_not_imported(home, monkeypatch):
    class Lazy(types.ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(f"asked for {name}")

    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    monkeypatch.setitem(sys.modules, "no module", object())
    own = replacement(lambda call: "ours")
    own.apply(home)
    own.restore()
    assert home.load("m")[0] == "original"
