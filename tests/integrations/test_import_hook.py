"""Functions that are called after an import, and leave no trace."""

from __future__ import annotations

import importlib
import runpy
import sys

import pytest

from paroquant_stream.integrations import import_hook
from paroquant_stream.integrations.import_hook import after_import, forget


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Two modules that can be imported, and were not."""
    for name in ("watched_module", "other_module"):
        (tmp_path / f"{name}.py").write_text("value = 1\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    calls = []
    action = lambda module: calls.append((module.__name__, module.value))  # noqa: E731
    yield calls, action
    forget(action)
    for name in ("watched_module", "other_module"):
        sys.modules.pop(name, None)


def test_an_action_is_called_after_each_import(modules):
    calls, action = modules
    after_import("watched_module", action)
    import other_module  # noqa: F401
    import watched_module

    importlib.reload(watched_module)
    assert calls == [("watched_module", 1)] * 2
    assert type(watched_module.__loader__).__name__ == "SourceFileLoader"
    assert watched_module.__spec__.loader is watched_module.__loader__


def test_a_forgotten_action_is_not_called(modules):
    calls, action = modules
    after_import("watched_module", action)
    forget(action)
    importlib.import_module("watched_module")
    assert calls == []
    assert import_hook._finder not in sys.meta_path


def test_an_import_that_began_before_forget_calls_nothing(modules):
    calls, action = modules
    after_import("watched_module", action)
    spec = import_hook._finder.find_spec("watched_module", None)
    forget(action)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (calls, module.value) == ([], 1)


def test_a_watched_module_runs_as_a_program(modules):
    """Runpy asks the module's own import loader for its code."""
    _, action = modules
    after_import("watched_module", action)
    assert runpy.run_module("watched_module")["value"] == 1


def test_an_absent_module_stays_absent(modules):
    _, action = modules
    after_import("nowhere_to_be_found", action)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("nowhere_to_be_found")
