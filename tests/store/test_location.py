"""Tests of the location of a store and of the checks of its owner."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

import pytest

from paroquant_stream.errors import StoreError
from paroquant_stream.files import atomic_file
from paroquant_stream.files.folder import Folder
from paroquant_stream.store.location import (
    check_owner,
    free_bytes,
    mark_as_cache,
    open_child,
    user_cache_root,
)
from paroquant_stream.store.store import Store


def test_the_environment_sets_the_user_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PAROQUANT_STREAM_CACHE", str(tmp_path))
    assert user_cache_root() == tmp_path
    monkeypatch.delenv("PAROQUANT_STREAM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache_root() == tmp_path / "xdg" / "paroquant" / "mlx_cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache_root() == tmp_path / "home" / ".cache" / "paroquant" / "mlx_cache"


def test_a_truncated_tag_is_rewritten(store):
    tag = store.root / "CACHEDIR.TAG"
    whole = tag.read_text()
    tag.write_text("")
    store.create()
    assert tag.read_text() == whole


def test_free_bytes_of_an_absent_path_are_its_parents(tmp_path):
    assert Store(tmp_path / "a" / "b").free_bytes() > 0


def test_free_space_that_is_unknown_is_a_store_error(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic_file, "free_bytes", fail)
    with pytest.raises(StoreError, match="cannot determine the free space: Input/output error"):
        free_bytes(tmp_path)


def test_an_existing_tag_is_not_rewritten(tmp_path):
    mark_as_cache(tmp_path)
    tag = tmp_path / "CACHEDIR.TAG"
    assert tag.read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    os.utime(tag, (0, 0))
    mark_as_cache(tmp_path)
    assert tag.stat().st_mtime == 0


@pytest.mark.parametrize("plant", ["link", "file"])
def test_a_child_that_is_no_directory_is_refused(tmp_path, plant):
    child = tmp_path / "child"
    child.symlink_to(tmp_path) if plant == "link" else child.write_text("")
    with (
        Folder.open(tmp_path) as folder,
        pytest.raises(StoreError, match="child: expected a directory, found a link or a file"),
    ):
        open_child(folder, "child", 0o700)


def test_an_absent_child_is_created_with_the_mode(tmp_path):
    with Folder.open(tmp_path) as folder:
        with pytest.raises(FileNotFoundError):
            open_child(folder, "child", None)
        open_child(folder, "child", 0o700).close()
    assert stat.S_IMODE((tmp_path / "child").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("owner", "mode", "trusted", "allowed"),
    [
        (1, 0o755, None, True),
        (2, 0o755, None, False),
        (1, 0o775, None, False),
        (1, 0o757, None, False),
        (2, 0o755, (2, 0o755), True),
        (3, 0o755, (2, 0o755), False),
        (1, 0o775, (1, 0o775), True),
        (1, 0o777, (1, 0o775), False),
    ],
)
def test_owner_and_mode_decide_who_is_trusted(tmp_path, monkeypatch, owner, mode, trusted, allowed):
    def status(user: int, mode: int) -> os.stat_result:
        return os.stat_result((stat.S_IFDIR | mode, 1, 1, 1, user, 1, 0, 0, 0, 0))

    monkeypatch.setattr(os, "geteuid", lambda: 1)
    monkeypatch.setattr(Folder, "status", lambda _: status(owner, mode))
    with (
        Folder.open(tmp_path) as folder,
        contextlib.nullcontext() if allowed else pytest.raises(StoreError),
    ):
        check_owner(folder, status(*trusted) if trusted else None)
