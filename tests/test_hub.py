"""A model's directory, from a path or a repository id."""

from __future__ import annotations

import pytest

from paroquant_stream.errors import CheckpointError
from paroquant_stream.hub import PATTERNS, resolve


def test_a_directory_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["absent", "/absent/model", "./a/b", "a/b/c", "~/absent"])
def test_what_is_no_directory_and_no_repository_id_is_refused_without_asking_the_hub(
    name, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="neither a model directory nor a repository id"):
        resolve(name)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="neither"):
        resolve(tmp_path / "file")


def test_a_repository_id_is_downloaded_without_code_or_pickles(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("owner/name") == tmp_path
    assert asked == {"name": "owner/name", "patterns": PATTERNS}
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in PATTERNS)


def test_what_the_hub_says_reaches_the_user(monkeypatch):
    import huggingface_hub

    def snapshot_download(*_, **__):
        raise OSError("404: no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        CheckpointError, match="owner/name: no such directory, and the Hub says: 404"
    ):
        resolve("owner/name")
