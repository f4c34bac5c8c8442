"""What is done otherwise on macOS, run here by seams. No Mac has run it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
from typing import ClassVar

import pytest

from paroquant_stream.files import descriptor, temp_files
from paroquant_stream.files.atomic_file import sync_directory
from paroquant_stream.files.folder import Folder
from paroquant_stream.files.new_file import new_file_at
from paroquant_stream.store.damage import forget_pages

FULL_SYNC, NO_CACHE = 51, 48  # <sys/fcntl.h> of macOS


class Mac:
    """The module `fcntl` as on macOS: notes the calls that Linux does not have."""

    def __init__(self, refusal=None):
        self.calls, self.refusal = [], refusal

    def fcntl(self, fd, command, argument=0):
        if command not in (FULL_SYNC, NO_CACHE):
            return fcntl.fcntl(fd, command, argument)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        self.calls.append((command, (name.rpartition(".")[0] and "temp") or name, argument))
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        return 0


@pytest.fixture
def mac(monkeypatch):
    """Turn the branches of macOS on."""
    if sys.platform != "linux":
        pytest.skip("looks names up in /proc")
    made = Mac()
    monkeypatch.setattr(descriptor, "fcntl", made)
    monkeypatch.setattr(descriptor, "_FULL_SYNC", FULL_SYNC)  # private: constants of the system
    monkeypatch.setattr(descriptor, "_NO_CACHE", NO_CACHE)
    monkeypatch.setattr(os, "fsync", lambda fd: made.calls.append(("fsync", fd)))
    return made


def test_the_constants_are_the_systems_own():
    assert getattr(fcntl, "F_FULLFSYNC", FULL_SYNC) == FULL_SYNC
    assert getattr(fcntl, "F_FULLFSYNC", None) == descriptor._FULL_SYNC
    assert getattr(fcntl, "F_NOCACHE", None) == descriptor._NO_CACHE


def test_a_published_file_and_its_name_pass_the_drives_cache(mac, tmp_path):
    with new_file_at(tmp_path / "x", 5) as file:
        file.write(memoryview(b"bytes"))
    assert mac.calls == [(FULL_SYNC, "temp", 0), (FULL_SYNC, tmp_path.name, 0)]
    mac.calls.clear()
    sync_directory(tmp_path)
    with Folder.open(tmp_path) as folder, folder.child("new", create=0o700) as child:
        child.sync()
    assert mac.calls == [(FULL_SYNC, name, 0) for name in (*[tmp_path.name] * 2, "new")]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_without_a_full_sync_a_plain_one_is_taken(mac, tmp_path, number):
    mac.refusal = number
    sync_directory(tmp_path)
    assert [call[0] for call in mac.calls] == [FULL_SYNC, "fsync"]


def test_a_full_sync_that_fails_is_not_tried_again(mac, tmp_path):
    mac.refusal = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        sync_directory(tmp_path)
    assert [call[0] for call in mac.calls] == [FULL_SYNC]


def test_large_files_and_checks_leave_the_page_cache_alone(mac, tmp_path, monkeypatch):
    """F_NOCACHE where Linux has O_DIRECT and posix_fadvise; a refusal is no error."""
    monkeypatch.setattr("paroquant_stream.files.block_writer._DIRECT", 0)
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    monkeypatch.setattr("paroquant_stream.files.block_writer.BLOCK", 4)
    for mac.refusal in (None, errno.ENOTSUP):
        mac.calls.clear()
        with new_file_at(tmp_path / "large", 9) as file:
            file.write(memoryview(b"123456789"))
        assert (tmp_path / "large").read_bytes() == b"123456789"
        assert [call[:2] for call in mac.calls].count((NO_CACHE, "temp")) == 1
        with open(tmp_path / "large", "rb") as file:
            forget_pages(file.fileno())
        assert mac.calls[-1] == (NO_CACHE, "large", 1)


def test_without_posix_fallocate_a_full_disk_shows_at_the_write(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with new_file_at(tmp_path / "x", 5) as file:
        file.write(memoryview(b"bytes"))
    assert (tmp_path / "x").read_bytes() == b"bytes"


def test_a_file_is_opened_again_from_its_start(tmp_path):
    """/dev/fd/N of macOS shares the offset of N, and MLX reads a header from there."""
    (tmp_path / "x").write_bytes(b"bytes")
    with descriptor.closing(os.open(tmp_path / "x", os.O_RDONLY)) as fd:
        for _ in range(2):
            assert descriptor.path_of(fd) == f"/dev/fd/{fd}"
            assert os.read(os.dup(fd), 5) == b"bytes"


def test_no_read_asks_for_more_than_macos_gives(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"0123456789")
    monkeypatch.setattr(descriptor, "_MOST", 4)
    sizes, preadv, pread = [], os.preadv, os.pread
    monkeypatch.setattr(os, "preadv", lambda f, v, at: sizes.append(len(v[0])) or preadv(f, v, at))
    monkeypatch.setattr(os, "pread", lambda f, n, at: sizes.append(n) or pread(f, n, at))
    with descriptor.closing(os.open(tmp_path / "x", os.O_RDONLY)) as fd:
        assert descriptor.read_some(fd, memoryview(bytearray(9)), 0) == 4
        assert descriptor.pread_exactly(fd, 1, 9, "x") == b"123456789"
        monkeypatch.delattr(os, "preadv")  # a Python for macOS 10.15
        into = memoryview(bytearray(9))
        assert (descriptor.read_some(fd, into, 8), bytes(into)) == (2, b"89" + bytes(7))
    assert sizes == [4, 4, 4, 1, 4]


class Kernel:
    """The C library of a Mac: `sysctlbyname`."""

    values: ClassVar = {
        b"kern.bootsessionuuid": b"6E2A\0",
        b"kern.boottime": (1234).to_bytes(16, "little"),
    }

    def __init__(self, path):
        assert path is None

    def sysctlbyname(self, name, value, size, new, new_size):
        assert (new, new_size) == (None, 0)
        if name not in self.values:
            return -1
        found = self.values[name]
        ctypes.memmove(value, found, len(found))
        size._obj.value = len(found)
        return 0


@pytest.fixture
def system(monkeypatch):
    """What `temp_files` knows of a Mac, after a change of `Kernel.values`."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", Kernel)
    monkeypatch.setattr(temp_files, "_read", lambda _: b"")  # neither /proc nor a machine id

    def read(**changes):
        values = {f"kern.{name}".encode(): value for name, value in changes.items()}
        monkeypatch.setattr(Kernel, "values", Kernel.values | values)
        return temp_files._this_system.__wrapped__()

    return read


def test_boots_of_a_mac_differ_and_have_a_time(system):
    first = system()
    assert first.booted == 1234.0
    assert system() == first
    assert system(bootsessionuuid=b"77B1\0").boot != first.boot


def test_two_macs_without_a_boot_id_are_not_one(system, monkeypatch):
    monkeypatch.setattr(Kernel, "values", {})
    first = system()
    assert (first.boot, first.booted) == (first.machine, 0.0)
    assert temp_files._short(b"") != first.boot
