"""`install` and `uninstall` hand `load` to the loader patch."""

from __future__ import annotations

import inspect

import pytest

import paroquant_stream
from paroquant_stream.integrations import loader_patch

OF_THE_PROGRAM = {"model_config", "tokenizer"}
"""Options of `load` that the replaced functions give."""


def test_install_replaces_the_loader_by_load_with_its_options(monkeypatch):
    calls = []
    monkeypatch.setattr(loader_patch, "install", lambda *a, **options: calls.append((a, options)))
    monkeypatch.setattr(loader_patch, "uninstall", lambda: calls.append("uninstall"))
    paroquant_stream.install(jobs=1, verify="full")
    paroquant_stream.uninstall()
    (given, options), undone = calls
    assert (given, undone) == ((paroquant_stream.load,), "uninstall")
    assert options == defaults(paroquant_stream.load) | {"jobs": 1, "verify": "full"}


def defaults(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {name: default for name, default in found.items() if name not in OF_THE_PROGRAM}


def test_install_has_the_keyword_options_of_load_and_their_types():
    by_load, by_install = (
        {
            p.name: (p.default, p.annotation)
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in OF_THE_PROGRAM
        }
        for function in (paroquant_stream.load, paroquant_stream.install)
    )
    assert by_install == by_load


@pytest.mark.parametrize(
    "option", ["lazy", "force_text", "model_path", "tokenizer", "model_config", "color"]
)
def test_an_option_that_the_caller_passes_or_none_has_is_refused(option):
    with pytest.raises(TypeError, match=option):
        paroquant_stream.install(**{option: True})
