"""Tests of the Hub's cache: whose blobs they are, and which links lead to them."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from paroquant_stream.checkpoint.hub_cache import HubCache, identity
from paroquant_stream.files.folder import Folder

ETAG, SHARED = "a" * 64, "b" * 64


@pytest.fixture
def repository(tmp_path):
    """A repository of two snapshots that link to one blob."""
    path = tmp_path / "hub" / "models--owner--name"
    (path / "blobs").mkdir(parents=True)
    (path / "blobs" / ETAG).write_bytes(b"x")
    for revision in ("one", "two"):
        (path / "snapshots" / revision).mkdir(parents=True)
        (path / "snapshots" / revision / "f").symlink_to(f"../../blobs/{ETAG}")
    return path


def cache_of(repository) -> HubCache:
    found = HubCache.of(repository / "snapshots" / "one")
    assert found is not None
    return found


def link_in(folder: Folder):
    return folder, "f", os.lstat(folder.path / "f")


def test_a_snapshot_has_the_cache_of_its_repository(repository, tmp_path):
    assert cache_of(repository).blobs == repository / "blobs"
    (tmp_path / "link").symlink_to(repository / "snapshots" / "one")
    assert HubCache.of(tmp_path / "link").blobs == repository / "blobs"


@pytest.mark.parametrize(
    "path", ["models--x/snapshot/one", "datasets--x/snapshots/one", "models--x/snapshots/one"]
)
def test_other_directories_have_no_cache(tmp_path, path):
    (tmp_path / path).mkdir(parents=True)
    assert HubCache.of(tmp_path / path) is None  # the last one lacks `blobs`


def test_only_the_repositorys_blobs_are_its_blobs(repository, tmp_path):
    cache, other = cache_of(repository), tmp_path / "blobs"
    other.mkdir()
    with Folder.open(repository / "blobs") as blobs, Folder.open(other) as wrong:
        assert cache.is_blob(blobs)
        assert cache.holds(blobs)
        assert not cache.is_blob(wrong)
        assert not cache.holds(wrong)


def test_shared_blobs_are_in_the_cache_too(repository):
    shared = repository.parent / "blobs" / "bb"
    shared.mkdir(parents=True)
    cache = cache_of(repository)
    with Folder.open(shared) as folder, Folder.open(repository) as outside:
        assert cache.holds(folder)
        assert not cache.is_blob(folder)
        assert not cache.holds(outside)


def test_a_link_of_another_revision_uses_the_blob(repository):
    cache = cache_of(repository)
    with Folder.open(repository / "snapshots" / "one") as folder:
        assert cache.is_used(ETAG, link_in(folder))
        (repository / "snapshots" / "two" / "f").unlink()
        assert not cache.is_used(ETAG, link_in(folder))


def test_a_second_name_in_the_same_snapshot_uses_the_blob(repository):
    (repository / "snapshots" / "two" / "f").unlink()
    with Folder.open(repository / "snapshots" / "one") as folder:
        (folder.path / "g").symlink_to(f"../../blobs/{ETAG}")
        assert cache_of(repository).is_used(ETAG, link_in(folder))


def test_a_link_in_a_subdirectory_uses_the_blob(repository):
    other = repository / "snapshots" / "two"
    (other / "f").unlink()
    (other / "sub").mkdir()
    (other / "sub" / "f").symlink_to(f"../../../blobs/{ETAG}")
    with Folder.open(repository / "snapshots" / "one") as folder:
        assert cache_of(repository).is_used(ETAG, link_in(folder))


def test_files_and_links_elsewhere_do_not_use_the_blob(repository, tmp_path):
    other = repository / "snapshots" / "two"
    (other / "f").unlink()
    (other / ETAG).write_bytes(b"a file")
    (other / "dangling").symlink_to("../absent/x")
    (tmp_path / ETAG).write_bytes(b"elsewhere")
    (other / "elsewhere").symlink_to(tmp_path / ETAG)
    (other / "another").symlink_to(f"../../blobs/{SHARED}")
    with Folder.open(repository / "snapshots" / "one") as folder:
        assert not cache_of(repository).is_used(ETAG, link_in(folder))


def test_a_shared_blob_is_removed_by_the_hubs_client(repository, monkeypatch):
    removed = []
    module = ModuleType("_shared_blobs")
    module.sweep_shared_blob = lambda path, cache_dir: removed.append((path, cache_dir))
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils._shared_blobs", module)
    with Folder.open(repository / "blobs") as folder:
        cache_of(repository).sweep_shared((folder, ETAG, os.stat(folder.path / ETAG)))
    assert removed == [(repository / "blobs" / ETAG, repository.parent)]


def test_an_older_client_shares_no_blobs(repository, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils._shared_blobs", None)
    with Folder.open(repository / "blobs") as folder:
        cache_of(repository).sweep_shared((folder, ETAG, os.stat(folder.path / ETAG)))
    assert (repository / "blobs" / ETAG).exists()


def test_identity_is_device_and_inode(tmp_path):
    status = tmp_path.stat()
    assert identity(status) == (status.st_dev, status.st_ino)
