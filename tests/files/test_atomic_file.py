"""A file gets its name only when it is complete and durable."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from paroquant_stream.errors import StoreError
from paroquant_stream.files import atomic_file, temp_files
from paroquant_stream.files.atomic_file import (
    AtomicFile,
    free_bytes,
    sync_directory,
    write_error,
    write_problem,
)
from paroquant_stream.files.descriptor import FileStamp
from paroquant_stream.files.folder import Folder

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d").mkdir()
    with Folder.open(tmp_path / "d") as folder:
        yield folder


def new(folder: Folder, size: int = 4, mode: int = 0o600) -> AtomicFile:
    return AtomicFile(folder, temp_files.temp_name(), size, mode)


def test_a_file_is_synced_renamed_and_its_name_synced(folder, monkeypatch):
    file, calls = new(folder), []
    os.write(file.fd, b"data")
    real = os.replace

    def replace(name, target, **options):
        calls.append("replace")
        real(name, target, **options)

    monkeypatch.setattr(os, "fsync", calls.append)
    monkeypatch.setattr(os, "replace", replace)
    stamp = file.publish(folder, "x", 4)
    assert calls == [file.fd, "replace", folder.fd]
    assert stamp == FileStamp.of((folder.path / "x").stat())
    file.discard()
    assert folder.names() == ["x"]
    assert (folder.path / "x").read_bytes() == b"data"


def test_readers_of_a_replaced_file_keep_its_bytes(folder):
    (folder.path / "x").write_bytes(b"old!")
    with (folder.path / "x").open("rb") as reader:
        file = new(folder)
        os.write(file.fd, b"data")
        file.publish(folder, "x", 4)
        file.discard()
        assert reader.read() == b"old!"
    assert (folder.path / "x").read_bytes() == b"data"


def test_a_file_of_another_size_is_not_published(folder):
    file = new(folder, size=0)
    os.write(file.fd, b"abc")
    with pytest.raises(StoreError, match="3 bytes on disk, 4 expected"):
        file.publish(folder, "x", 4)
    file.discard()
    assert folder.names() == []


def test_a_file_that_cannot_be_synced_is_not_published(folder, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    file = new(folder)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        file.publish(folder, "x", 4)
    file.discard()
    assert folder.names() == []


def test_a_discarded_file_leaves_nothing_behind(folder):
    file = new(folder)
    fd = file.fd
    file.discard()
    file.discard()
    assert folder.names() == []
    assert not temp_files.is_open(file.path.name)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_the_mode_is_that_of_the_caller(folder):
    file = new(folder, mode=0o640)
    assert stat.S_IMODE(os.fstat(file.fd).st_mode) == 0o640
    file.discard()


@pytest.mark.parametrize("plant", ["link", "file"])
def test_what_is_planted_at_the_temp_name_is_left_alone(tmp_path, folder, plant):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    name = temp_files.temp_name()
    (folder.path / name).symlink_to(victim) if plant == "link" else os.link(
        victim, folder.path / name
    )
    with pytest.raises(FileExistsError):
        AtomicFile(folder, name, 4, 0o600)
    assert victim.read_bytes() == b"precious"
    assert folder.names() == [name]
    assert not temp_files.is_open(name)


def test_space_is_reserved_before_anything_is_written(folder, monkeypatch):
    reserved = []
    monkeypatch.setattr(
        os, "posix_fallocate", lambda _, *size: reserved.append(size), raising=False
    )
    new(folder, size=12345).discard()
    new(folder, size=0).discard()
    assert reserved == [(0, 12345)]


LARGE = 16 << 20


@pytest.mark.parametrize(
    ("size", "in_memory", "expected"),
    [
        (LARGE, True, []),  # the kernel would clear its pages for nothing
        (LARGE - 1, True, [(0, LARGE - 1)]),
        (LARGE, False, [(0, LARGE)]),
        (0, False, []),
    ],
)
def test_a_large_file_in_memory_is_not_reserved(folder, monkeypatch, size, in_memory, expected):
    reserved, asked = [], []
    monkeypatch.setattr(
        os, "posix_fallocate", lambda _, *size: reserved.append(size), raising=False
    )
    monkeypatch.setattr(atomic_file, "is_in_memory", lambda fd: asked.append(fd) or in_memory)
    file = new(folder, size)
    assert reserved == expected
    assert asked == [file.fd] * (size >= LARGE)
    file.discard()


@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.ENOSPC, True), (errno.EIO, True), (errno.EOPNOTSUPP, False), (errno.EINVAL, False)],
)
def test_only_a_file_system_without_fallocate_is_excused(folder, monkeypatch, number, raised):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    if raised:
        with pytest.raises(OSError, match=os.strerror(number)):
            new(folder)
    else:
        new(folder).discard()
    assert folder.names() == []


def test_a_temp_is_announced_before_it_exists(folder, monkeypatch):
    # private: only the moment of the creation shows the order
    real, announced = atomic_file._create, []

    def create(folder, name, *rest, **options):
        announced.append(temp_files.is_open(name))
        return real(folder, name, *rest, **options)

    monkeypatch.setattr(atomic_file, "_create", create)
    new(folder).discard()
    assert announced == [True]


def test_a_temp_that_cannot_be_created_is_not_open(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "bad")

    monkeypatch.setattr(os, "open", fail)
    name = temp_files.temp_name()
    with pytest.raises(OSError, match="bad"):
        AtomicFile(folder, name, 4, 0o600)
    assert not temp_files.is_open(name)


def test_free_bytes_of_a_path_that_is_still_absent(tmp_path, monkeypatch):
    asked = []

    class Status:
        f_bavail, f_frsize, f_bfree = 10, 4096, 99

    monkeypatch.setattr(os, "statvfs", lambda path: asked.append(path) or Status)
    assert free_bytes(tmp_path / "a" / "b") == 40_960
    assert asked == [tmp_path]


def test_a_directory_is_synced_by_path(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    sync_directory(tmp_path)
    assert synced == [tmp_path.stat().st_ino]


def test_a_full_disk_is_explained_with_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_file, "free_bytes", lambda _: 1234)
    assert write_problem(tmp_path / "x", 56789, FULL) == (
        f"{tmp_path}/x: No space left on device; 56.8 kB needed, 1.2 kB free; "
        "free some space and run again"
    )
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "56.8 kB needed" in str(write_error(tmp_path / "x", 56789, quota))


def test_another_error_is_explained_by_its_reason(tmp_path):
    error = write_error(tmp_path / "x", 5, OSError(errno.EROFS, "Read-only file system"))
    assert isinstance(error, StoreError)
    assert str(error) == f"{tmp_path}/x: Read-only file system"


def test_an_interrupt_while_it_is_made_leaves_no_file_or_lease(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_file, "_reserve", interrupted)
    name = temp_files.temp_name()
    with pytest.raises(KeyboardInterrupt):
        AtomicFile(folder, name, 4, 0o600)
    assert folder.names() == []
    assert not temp_files.is_open(name)
