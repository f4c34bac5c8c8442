"""Directories by descriptor: no link below one is followed."""

from __future__ import annotations

import os
import shutil
import stat

import pytest

from paroquant_stream.errors import MalformedFileError
from paroquant_stream.files.folder import Folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d").mkdir()
    with Folder.open(tmp_path / "d") as folder:
        yield folder


def test_the_path_to_a_folder_may_have_links(tmp_path, folder):
    (tmp_path / "link").symlink_to("d")
    with Folder.open(tmp_path / "link") as linked:
        assert linked.status().st_ino == folder.status().st_ino


def test_a_folder_follows_its_directory_when_it_is_moved(tmp_path, folder):
    (tmp_path / "d" / "x").write_bytes(b"x")
    (tmp_path / "d").rename(tmp_path / "moved")
    (tmp_path / "d").mkdir()
    assert folder.names() == ["x"]


def test_a_child_is_created_with_its_mode_and_synced(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with pytest.raises(FileNotFoundError):
        folder.child("sub")
    with folder.child("sub", create=0o700) as child:
        assert stat.S_IMODE(child.status().st_mode) == 0o700
    assert synced == [folder.fd]
    with folder.child("sub", create=0o700), folder.child("sub"):
        pass
    assert synced == [folder.fd]  # it was there


def test_a_child_created_by_another_process_is_opened(folder, monkeypatch):
    real = os.mkdir

    def mkdir(name, mode, dir_fd):
        real(name, mode, dir_fd=dir_fd)
        raise FileExistsError

    monkeypatch.setattr(os, "mkdir", mkdir)
    with folder.child("sub", create=0o700) as child:
        assert child.path == folder.path / "sub"


@pytest.mark.parametrize("create", [None, 0o700])
def test_a_child_that_is_a_link_or_a_file_is_refused(tmp_path, folder, create):
    (tmp_path / "outside").mkdir()
    (tmp_path / "d" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "d" / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(OSError, match=r"link|Not a directory"):
            folder.child(name, create)


def test_a_file_is_opened_and_anything_else_is_refused(tmp_path, folder):
    (tmp_path / "d" / "x").write_bytes(b"x")
    with open(folder.open_file("x"), "rb") as file:
        assert file.read() == b"x"
    (tmp_path / "d" / "link").symlink_to("x")
    with pytest.raises(OSError, match="link"):
        folder.open_file("link")
    (tmp_path / "d" / "sub").mkdir()
    with pytest.raises(MalformedFileError, match="sub: expected a regular file"):
        folder.open_file("sub")


def test_files_are_the_regular_ones_sorted(tmp_path, folder, monkeypatch):
    for name in ("b", "a", "gone"):
        (tmp_path / "d" / name).write_bytes(name.encode())
    (tmp_path / "d" / "link").symlink_to("a")
    (tmp_path / "d" / "sub").mkdir()
    assert folder.names() == ["a", "b", "gone", "link", "sub"]
    assert folder.stat("link").st_size == 1
    real = os.stat

    def vanish(name, **options):
        if name == "gone":
            raise FileNotFoundError
        return real(name, **options)

    monkeypatch.setattr(os, "stat", vanish)
    assert [(name, status.st_size) for name, status in folder.files()] == [("a", 1), ("b", 1)]


def test_a_file_is_replaced_across_folders(tmp_path, folder):
    (tmp_path / "d" / "x").write_bytes(b"new")
    with folder.child("sub", create=0o700) as target:
        (tmp_path / "d" / "sub" / "y").write_bytes(b"old")
        folder.replace("x", target, "y")
        assert (tmp_path / "d" / "sub" / "y").read_bytes() == b"new"
        assert folder.names() == ["sub"]
        target.unlink("y")
        assert target.names() == []


def test_sync_makes_the_directory_itself_durable(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    folder.sync()
    assert synced == [folder.fd]


def test_a_closed_folder_does_not_reach_another_descriptor(folder):
    fd = folder.fd
    folder.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    again = os.open(os.devnull, os.O_RDONLY)  # often the same number
    folder.close()
    os.fstat(again)
    os.close(again)
    with pytest.raises(OSError, match="Bad file descriptor"):
        folder.status()


def test_a_removed_directory_is_an_error(tmp_path):
    (tmp_path / "e").mkdir()
    with Folder.open(tmp_path / "e") as folder:
        shutil.rmtree(tmp_path / "e")
        with pytest.raises(FileNotFoundError):
            folder.child("sub", create=0o700)
