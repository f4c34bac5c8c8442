"""`install` and `uninstall` hand `load` to the loader patch."""

from __future__ import annotations

import pytest

import paroquant_stream
from paroquant_stream.integrations import loader_patch


def test_install_replaces_the_loader_by_load_with_its_options(monkeypatch):
    calls = []
    monkeypatch.setattr(loader_patch, "install", lambda *a, **options: calls.append((a, options)))
    monkeypatch.setattr(loader_patch, "uninstall", lambda: calls.append("uninstall"))
    paroquant_stream.install(jobs=1, verify="full")
    paroquant_stream.uninstall()
    assert calls == [((paroquant_stream.load,), {"jobs": 1, "verify": "full"}), "uninstall"]


@pytest.mark.parametrize("option", ["lazy", "force_text", "model_path", "tokenizer", "color"])
def test_an_option_that_the_caller_passes_or_none_has_is_refused(option):
    with pytest.raises(TypeError, match=option):
        paroquant_stream.install(**{option: True})
