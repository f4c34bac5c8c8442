"""Where the model lies that a user named."""

from __future__ import annotations

import pytest

from paroquant_stream.checkpoint.hub import HubModel
from paroquant_stream.checkpoint.locate import locate
from paroquant_stream.errors import CheckpointError
from tests.helpers.hub_models import REPO


def test_a_directory_needs_no_hub(tmp_path):
    assert locate(tmp_path) == (tmp_path, None)


@pytest.mark.parametrize("name", ["absent", "/absent/model", "./a/b", "a/b/c", "~/absent"])
def test_other_names_are_refused_without_a_request(name, hub):
    with pytest.raises(CheckpointError, match="neither a model directory nor a repository id"):
        locate(name)
    assert hub.log == []


def test_an_empty_name_is_not_the_current_directory(model_dir, monkeypatch):
    monkeypatch.chdir(model_dir)
    with pytest.raises(CheckpointError, match="the name of the model is empty"):
        locate("")


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co/{}", "hf.co/{}/", "https://huggingface.co/{}/tree/main"],
)
def test_the_address_of_its_page_names_a_repository(hub, commit, address):
    assert locate(address.format(REPO))[1] == HubModel(REPO, commit)


def test_the_address_of_a_revision_names_that(hub, commit):
    hub.repos[REPO]["v1"] = commit
    del hub.repos[REPO]["main"]
    assert locate(f"https://huggingface.co/{REPO}/tree/v1")[1] == HubModel(REPO, commit)


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co/owner", "https://example.com/owner/name", "https://hf.co/o/n/blob/x"],
)
def test_other_addresses_are_refused_without_a_request(hub, address):
    with pytest.raises(CheckpointError, match="neither a model directory nor a repository id"):
        locate(address)
    assert hub.log == []


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="neither"):
        locate(tmp_path / "file")


def test_a_directory_has_no_revision(tmp_path):
    with pytest.raises(CheckpointError, match="--revision is for the Hub"):
        locate(tmp_path, "main")
