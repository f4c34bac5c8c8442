"""Which record completes a model whose shards are absent: its own, or none."""

from __future__ import annotations

import shutil

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.conversion.find_dropped import find_dropped, find_manifest
from paroquant_stream.conversion.request import make_request
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint
from tests.helpers.conversions import run
from tests.helpers.hub_models import digests


@pytest.fixture
def moved(tmp_path):
    """A model whose shards were removed and that lies elsewhere since, so that only its config and
    index tell of it.
    """
    directory = write_checkpoint(tmp_path / "local", cut=cut_evenly(3))
    run(directory, drop_source=True)
    return directory.rename(tmp_path / "moved")


def test_a_model_of_the_hub_is_never_completed_by_a_twin(hub, moved, tmp_path):
    """Its shards can be downloaded, and only its weights differ."""
    twin = write_checkpoint(tmp_path / "twin", llama_tensors(1), cut_evenly(3))
    right = digests(convert_checkpoint(twin, cache_dir=tmp_path / "right"))
    hub.push("owner/twin", twin)
    assert digests(convert_checkpoint("owner/twin")) == right
    assert len(hub.downloads()) == 3
    assert find_dropped(make_request(moved))


def test_a_manifest_that_two_models_may_have_is_neither_ones(tmp_path):
    """Twins that lost their manifests, in the same cache."""
    twins = [
        write_checkpoint(tmp_path / name, llama_tensors(seed), cut_evenly(3))
        for seed, name in enumerate(("one", "two"))
    ]
    requests = [make_request(directory) for directory in twins]
    shutil.copytree(twins[0], tmp_path / "unknown")
    for directory, request in zip(twins, requests, strict=True):
        made = run(directory, drop_source=True).manifest
        request.store.manifest_path(request.manifest_name).unlink()
        found = find_manifest(request)  # by its note
        assert [r.source_sha256 for r in found.entries] == [r.source_sha256 for r in made.entries]
    assert find_manifest(make_request(tmp_path / "unknown")) is None
