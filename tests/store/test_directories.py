"""Tests of the directories of a store: links, owners, modes and errors."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from paroquant_stream.errors import StoreError
from paroquant_stream.files.folder import Folder
from paroquant_stream.store.store import Store
from tests.helpers.stores import KEY, publish


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_root_that_others_can_write_is_refused(store, mode):
    store.check_owner()
    store.root.chmod(mode)
    with pytest.raises(StoreError, match="chmod go-w"):
        store.check_owner()


def test_a_root_of_another_user_is_refused(store, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StoreError, match=r"not by you \(12345\).*--cache-dir"):
        store.check_owner()


def test_an_unreadable_owner_is_a_store_error(store, monkeypatch):
    def fail(*_arguments, **_options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Folder, "status", fail)
    with pytest.raises(StoreError, match="cannot be opened: Input/output error"):
        store.check_owner()


@pytest.mark.parametrize("below", ["v1", "v1/entries", "v1/entries/ab", "v1/tmp", "v1/manifests"])
def test_a_subdirectory_that_others_can_write_is_refused(store, below):
    publish(store, b"x")
    (store.root / below).chmod(0o777)
    with pytest.raises(StoreError, match=f"{below}: others can write into it .*chmod go-w"):
        publish(store, b"y")
        store.write_file("manifests", "m.msgpack", b"z")


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("below", ["v1", "v1/entries", "v1/entries/ab", "v1/tmp", "v1/manifests"])
def test_links_below_the_root_are_not_followed(tmp_path, below, private):
    store = Store(tmp_path / "model" / "mlx", private=private)
    (tmp_path / "model").mkdir()
    store.create()
    publish(store, b"x")
    outside = tmp_path / "outside"
    (store.root / below).rename(outside)
    (store.root / below).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(StoreError, match=f"{below}: expected a directory, found a link"):
        publish(store, b"y")
        store.write_file("manifests", "m.msgpack", b"z")
    assert sorted(outside.rglob("*")) == before


def test_only_the_root_of_a_user_cache_may_be_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(StoreError, match="link: expected a directory, found a link"):
        Store(tmp_path / "link", private=False).create()
    assert not list(outside.iterdir())
    store = Store(tmp_path / "link")
    store.create()
    publish(store, b"x")
    assert store.entry_size(KEY) == 1


def test_a_store_in_a_model_trusts_writers_of_the_model(tmp_path):
    model = tmp_path / "model"
    model.mkdir(mode=0o755)
    store = Store(model / "mlx", private=False)
    store.create()
    store.folder("entries").chmod(0o777)
    with pytest.raises(StoreError, match="others can write into it"):
        publish(store, b"x")
    model.chmod(0o777)
    publish(store, b"x")


def test_an_absent_or_in_place_store_passes_the_check(store, tmp_path):
    store.root.chmod(0o777)
    tmp_path.chmod(0o777)
    Store(store.root, private=False).check_owner()
    Store(tmp_path / "absent").check_owner()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_cache_is_private_under_any_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        store = Store(tmp_path / "private")
        store.create()
        publish(store, b"x")
    finally:
        os.umask(before)
    for path in (store.root, *store.root.rglob("*")):
        if path.name != "CACHEDIR.TAG":
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_store_in_a_model_follows_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        store = Store(tmp_path / "mlx", private=False)
        store.create()
        publish(store, b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.entry_path(KEY).stat().st_mode) == 0o644
    assert stat.S_IMODE(store.entry_path(KEY).parent.stat().st_mode) == 0o755


def test_a_failed_create_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--cache-dir"):
        Store(tmp_path / "file" / "cache").create()


def fsynced(monkeypatch, action) -> set[int]:
    """The inodes of the files and directories that an action syncs."""
    inodes, real = set(), os.fsync

    def fsync(fd):
        inodes.add(os.fstat(fd).st_ino)
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        action()
    return inodes


def test_creating_a_store_syncs_the_new_names(tmp_path, monkeypatch):
    store = Store(tmp_path / "above" / "cache")
    synced = fsynced(monkeypatch, store.create)
    named = (tmp_path / "above", store.root)
    assert {path.stat().st_ino for path in named} <= synced


def test_syncing_an_entry_syncs_its_files_and_both_directories(store, monkeypatch):
    publish(store, b"x")
    path = store.entry_path(KEY)
    synced = fsynced(monkeypatch, lambda: store.sync_entry(KEY))
    parts = (path, path.with_suffix(".digest"), path.parent, store.folder("entries"))
    assert synced == {part.stat().st_ino for part in parts}
    path.with_suffix(".digest").unlink()
    store.sync_entry(KEY)  # an old entry
    with pytest.raises(StoreError, match="cannot be made durable"):
        store.sync_entry("cd" * 32)


def test_only_a_user_cache_has_a_tag_and_lock_files(tmp_path, store):
    in_model = Store(tmp_path / "mlx", private=False)
    in_model.create()
    assert {path.name for path in store.root.iterdir()} == {"CACHEDIR.TAG", "v1"}
    assert {path.name for path in in_model.root.iterdir()} == {"v1"}
    kinds = {"entries", "manifests", "dropped", "memo", "tmp"}
    assert {path.name for path in (store.root / "v1").iterdir()} == kinds | {"locks"}
    assert {path.name for path in (in_model.root / "v1").iterdir()} == kinds


def test_a_file_is_read_up_to_one_byte_over_the_limit(store):
    store.write_file("manifests", "x", b"12345")
    assert store.read_file("manifests", "x", 5) == b"12345"
    assert store.read_file("manifests", "x", 3) == b"1234"
    assert store.read_file("manifests", "absent", 3) is None


def test_only_regular_files_are_listed_and_read(store):
    store.write_file("manifests", "x", b"1")
    folder = store.folder("manifests")
    (folder / "sub").mkdir()
    (folder / "link").symlink_to("x")
    os.mkfifo(folder / "pipe")
    assert store.file_names("manifests") == ["x"]
    assert [store.read_file("manifests", name, 9) for name in ("sub", "link", "pipe")] == [None] * 3
    assert store.file_names("damaged") == []


def test_a_write_error_names_the_directory(store, monkeypatch):
    def fail(*_arguments, **_options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StoreError, match="manifests: cannot be written: Read-only file system"):
        store.write_file("manifests", "x", b"1")
