"""Models, as manifests and records of removed sources describe them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.maintenance.inventory import take_inventory
from paroquant_stream.store import manifest as manifest_module
from tests.helpers.builders import write_checkpoint
from tests.helpers.manifests import manifest_of

pytestmark = pytest.mark.usefixtures("settled")


def test_the_directory_is_known_from_any_working_directory(store, model_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(model_dir.parent)
    convert_checkpoint(model_dir.name, force=True)
    monkeypatch.chdir(tmp_path.root)
    (model,) = take_inventory(store).models
    assert model.directory == model_dir


def test_a_manifest_with_another_models_path_is_not_used(store, model_dir, tmp_path):
    path, manifest = manifest_of(store)
    other = write_checkpoint(tmp_path / "other")
    path.write_bytes(replace(manifest, directory=str(other), model=str(other)).encode())
    (model,) = take_inventory(store).models
    assert model.directory is None
    assert str(other) in model.name


def test_a_manifest_before_1_1_is_known_by_its_name(store, model_dir, monkeypatch):
    path, manifest = manifest_of(store)
    old = replace(manifest, directory="", model=model_dir.name)
    monkeypatch.setattr(manifest_module, "MINOR", 0)
    path.write_bytes(old.encode())
    monkeypatch.chdir(model_dir.parent)
    assert take_inventory(store).models[0].directory == model_dir
    monkeypatch.chdir("/")
    assert take_inventory(store).models[0].directory is None


def test_a_hub_model_is_named_by_repository_and_revision(store, tmp_path):
    snapshots = tmp_path / "models--owner--some--name" / "snapshots"
    for revision in ("a" * 40, "b" * 40):
        convert_checkpoint(write_checkpoint(snapshots / revision))
    names = [model.name for model in take_inventory(store).models][1:]
    assert names == ["owner/some--name@aaaaaaaa", "owner/some--name@bbbbbbbb"]
    assert "owner/some--name" in take_inventory(store).models[1].names


def test_a_model_whose_directory_is_gone_is_an_orphan(store, model_dir):
    shutil.rmtree(model_dir)
    (model,) = take_inventory(store).models
    assert model.is_orphan
    assert model.name == str(model_dir)


def test_a_drop_journal_claims_its_entries(store):
    path, manifest = manifest_of(store)
    journal = path.with_name(f"{path.stem}.dropped.msgpack")
    records = tuple(replace(record, dropped=True) for record in manifest.entries[:2])
    journal.write_bytes(replace(manifest, entries=records).encode())
    (model,) = take_inventory(store).models
    assert (len(model.files), model.only_copy) == (2, True)
    path.unlink()
    (model,) = take_inventory(store).models
    assert (model.manifest, model.is_damaged, len(model.records)) == (None, False, 2)
    assert len(take_inventory(store).unclaimed) == 1


def test_a_name_with_a_slash_in_a_manifest_is_no_shard(store):
    path, manifest = manifest_of(store)
    hostile = replace(manifest.entries[0], shard="../../secret")
    path.write_bytes(replace(manifest, entries=(hostile,)).encode())
    assert take_inventory(store).models[0].is_damaged
