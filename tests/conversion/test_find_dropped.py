"""Which record completes a model whose shards are absent: its own, or none."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.conversion.find_dropped import find_dropped, find_manifest
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import CheckpointError
from paroquant_stream.store.drop_note import NOTE
from paroquant_stream.store.drop_record import read_records, write_record
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint
from tests.helpers.conversions import run
from tests.helpers.hub_models import digests
from tests.helpers.records import flip_last_byte


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


@pytest.fixture
def older(model_dir, tmp_path):
    """A model as an older version left it: a manifest that drops, kept headers, no record."""
    backup = shutil.copytree(model_dir, tmp_path / "backup")
    manifest = run(model_dir, drop_source=True).manifest
    store = make_request(model_dir).store
    shutil.rmtree(store.folder("dropped"))
    (model_dir / NOTE).unlink()
    store.folder("headers").mkdir(exist_ok=True)
    for record in manifest.entries:
        data = (backup / record.shard).read_bytes()
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        seal = hashlib.sha256(header).digest()
        (store.folder("headers") / record.source_sha256).write_bytes(seal + header)
    return model_dir, manifest


def test_what_an_older_version_dropped_is_found_by_its_manifest(older):
    directory, manifest = older
    record = find_dropped(make_request(directory))
    assert record.manifest == manifest
    assert all(record.header(entry.shard).tensors for entry in manifest.entries)


def test_a_kept_header_with_a_flipped_bit_is_none(older):
    directory, manifest = older
    damaged = manifest.entries[1]
    flip_last_byte(make_request(directory).store.folder("headers") / damaged.source_sha256)
    record = find_dropped(make_request(directory))
    assert record.headers.keys() == {e.shard for e in manifest.entries} - {damaged.shard}


def test_what_an_older_version_dropped_completes_no_other_model(older, tmp_path):
    """One shard of another model lies where the dropped one was."""
    directory, manifest = older
    twin = write_checkpoint(tmp_path / "twin", llama_tensors(1), cut_evenly(3))
    shard = manifest.entries[0].shard
    shutil.copy(twin / shard, directory / shard)
    assert find_dropped(make_request(directory)) is None
    with pytest.raises(CheckpointError, match="absent"):
        run(directory)


def test_a_manifest_of_other_shards_is_not_the_models(model_dir):
    """Its record was lost but for an interrupted drop, which names only what was finished."""
    request = make_request(model_dir)
    run(model_dir, drop_source=True)
    request.store.manifest_path(request.manifest_name).unlink()
    assert find_manifest(request)
    assert find_manifest(make_request(model_dir, dtype="float16")) is None
    (record,) = read_records(request.store)
    part = replace(record.manifest, entries=record.manifest.entries[:2])
    write_record(request.store, replace(record, manifest=part))
    assert find_manifest(request) is None


def test_a_manifest_of_another_config_is_not_the_models(model_dir):
    request = make_request(model_dir)
    run(model_dir, drop_source=True)
    request.store.manifest_path(request.manifest_name).unlink()
    config = model_dir / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-06"))
    assert find_manifest(make_request(model_dir)) is None


def test_a_manifest_outlives_both_copies_of_its_record(model_dir):
    """The note names a record that cannot be read: no reason to doubt the manifest."""
    first = run(model_dir, drop_source=True)
    copies = [*make_request(model_dir).store.folder("dropped").iterdir()]
    assert len(copies) == 2
    for path in copies:
        flip_last_byte(path)
    assert run(model_dir).manifest == first.manifest
