"""Which models are ParoQuant's."""

from __future__ import annotations

import json

import pytest

from paroquant_stream.integrations.paroquant_models import find_local, find_on_hub
from tests.helpers.paths import FIXTURES


@pytest.mark.parametrize("name", ["llama-awq-single", "llama-legacy-size", "gemma4-awq-size"])
def test_a_checkpoint_is_found(name):
    found = find_local(str(FIXTURES / name))
    assert (found.directory, found.name, found.options) == (FIXTURES / name, FIXTURES / name, {})


@pytest.mark.parametrize(
    ("config", "is_ours"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, False),
        ({"quantization_config": {"bits": 4}}, False),
        ({"quantization": {"bits": 4, "group_size": 64}}, False),
        ({}, False),
        ([], False),
        ("text", False),
        ({"text_config": {"quantization_config": {"quant_method": "paroquant"}}}, True),
        ({"quantization_config": {"bits": 4}, "paroquant_stream": {"format": 1}}, True),
    ],
)
def test_the_method_decides(tmp_path, config, is_ours):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (find_local(tmp_path) is not None) == is_ours


@pytest.mark.parametrize("text", [None, b"", b"{", b"\xff", b"[" * 100_000])
def test_a_config_that_cannot_be_read_is_not_ours(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    assert find_local(tmp_path) is None
    assert find_local(tmp_path / "nothing") is None


def test_a_repository_is_found_by_its_config_alone(hub, model_dir):
    commit = hub.push("owner/paro", model_dir)
    found = find_on_hub("owner/paro", None)
    assert (found.name, found.revision, found.directory.name) == ("owner/paro", commit, commit)
    assert found.options == {"revision": commit}
    assert [path.name for path in found.directory.iterdir()] == ["config.json"]


def test_another_repository_or_none_is_not_ours(hub, tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "llama"}')
    hub.push("owner/plain", tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    names = (
        "owner/plain",
        "owner/nothing",
        "plain",
        "a/b/c",
        "./a",
        "/a",
        "~/a",
        "plain/config.json",
    )
    assert [find_on_hub(name, None) for name in names] == [None] * len(names)
