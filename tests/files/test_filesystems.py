"""How far a ctime can be trusted: by the type of the file system, and by the file itself."""

from __future__ import annotations

import ctypes
import io
import os
import sys
import tempfile

import pytest

from paroquant_stream.files import filesystems
from paroquant_stream.files.descriptor import FileStamp
from paroquant_stream.files.filesystems import Ctime, ctime_kind, is_in_memory, shows_changes
from tests.helpers.images import LINUX_ROOT, mounted, squashed

LATE, EARLY, WHOLE = 1_700_000_000_123_456_789, 1_600_000_000_123_456_789, 1_700_000_000_000_000_000


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    # private: the results are cached for the life of the process
    monkeypatch.setattr(filesystems, "_known", {})


@pytest.fixture
def proc(monkeypatch):
    """Replace the mounts in /proc by these rows, and count how often they are read."""
    rows: dict[int, str] = {}
    reads = []

    def read(path, _mode):
        if path == "/proc/self/mountinfo":
            reads.append(path)
            return io.BytesIO(
                "".join(f"{n} 1 0:9 / /m rw - {r}\n" for n, r in rows.items()).encode()
            )
        fd = int(path.removeprefix("/proc/self/fdinfo/"))
        return io.BytesIO(f"pos:\t0\nmnt_id:\t{fd}\nino:\t1\n".encode())

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(filesystems, "open", read, raising=False)
    return rows, reads


def kind_of(path) -> Ctime:
    fd = os.open(path, os.O_RDONLY)
    try:
        return ctime_kind(fd, os.fstat(fd).st_dev, os.fstatvfs(fd).f_fsid)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ext4", Ctime.LOCAL), ("xfs", Ctime.LOCAL), ("btrfs", Ctime.LOCAL), ("tmpfs", Ctime.LOCAL),
     ("ext3", Ctime.WEAK), ("nfs4", Ctime.WEAK), ("ceph", Ctime.WEAK), ("lustre", Ctime.WEAK),
     ("squashfs", Ctime.NONE), ("erofs", Ctime.NONE), ("iso9660", Ctime.NONE), ("vfat", Ctime.NONE),
     ("exfat", Ctime.NONE), ("fuse", Ctime.UNKNOWN), ("fuse.sshfs", Ctime.UNKNOWN),
     ("fuseblk", Ctime.UNKNOWN), ("9p", Ctime.UNKNOWN), ("virtiofs", Ctime.UNKNOWN),
     ("cifs", Ctime.UNKNOWN), ("unknown-fs", Ctime.UNKNOWN)],
)  # fmt: skip
def test_the_mount_of_the_descriptor_decides(proc, name, kind):
    proc[0].update({7: "proc proc rw", 8: f"{name} /dev/sdb1 rw,size=1k", 88: "ext4 /dev/sda rw"})
    assert ctime_kind(8, 1, 1) is kind


def test_mounts_are_read_once_for_each_file_system(proc):
    rows, reads = proc
    rows.update({7: "ext4 /dev/sda rw", 8: "squashfs /dev/loop0 ro"})
    assert [ctime_kind(7, 1, 1) for _ in range(30)] == [Ctime.LOCAL] * 30
    assert len(reads) == 1
    assert ctime_kind(8, 1, 2) is Ctime.NONE  # the same device, another file system
    assert ctime_kind(8, 2, 2) is Ctime.NONE
    assert len(reads) == 3


def test_a_mount_that_is_not_listed_is_unknown(proc, monkeypatch):
    assert ctime_kind(7, 1, 1) is Ctime.UNKNOWN
    proc[0][8] = "no source and no options"
    assert ctime_kind(8, 2, 1) is Ctime.UNKNOWN

    def refuse(*_):
        raise FileNotFoundError

    monkeypatch.setattr(filesystems, "open", refuse, raising=False)
    assert ctime_kind(7, 3, 1) is Ctime.UNKNOWN


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ("rw,lowerdir=/local:/local,upperdir=/local,workdir=/x", Ctime.LOCAL),
        ("rw,lowerdir=/local:/image,upperdir=/local", Ctime.NONE),
        ("rw,lowerdir=/local,upperdir=/kept", Ctime.WEAK),
        ("rw,lowerdir+=/local,lowerdir+=/image,datadir+=/local", Ctime.NONE),
        ("ro,lowerdir=/local:/local::/image", Ctime.NONE),
        ("rw,lowerdir=/local,upperdir=/absent", Ctime.UNKNOWN),
        ("rw,lowerdir=l/ABC:l/DEF,upperdir=/local", Ctime.UNKNOWN),
        (r"rw,lowerdir=/local:/with\040space", Ctime.UNKNOWN),
        ("rw", Ctime.UNKNOWN),
    ],
)
def test_an_overlay_is_trusted_as_its_worst_layer(proc, monkeypatch, options, kind):
    def layer(path):
        if path == "/absent":
            raise FileNotFoundError
        return {"/local": Ctime.LOCAL, "/kept": Ctime.WEAK, "/image": Ctime.NONE}[path]

    # private: an overlay of such layers cannot be mounted on every machine
    monkeypatch.setattr(filesystems, "_of_layer", layer)
    proc[0][8] = f"overlay overlay {options}"
    assert ctime_kind(8, 1, 1) is kind


@pytest.mark.parametrize(
    ("kind", "mtime", "ctime", "shown"),
    [
        (Ctime.LOCAL, LATE, LATE, True),  # a file that was plainly written
        (Ctime.LOCAL, EARLY, LATE, True),
        (Ctime.LOCAL, LATE, EARLY, True),  # an mtime from the future
        (Ctime.LOCAL, EARLY, WHOLE, False),  # made by a program that builds images
        (Ctime.LOCAL, EARLY, 0, False),
        (Ctime.WEAK, WHOLE, WHOLE, True),
        (Ctime.WEAK, EARLY, 0, False),
        (Ctime.UNKNOWN, LATE, LATE, False),
        (Ctime.UNKNOWN, EARLY, LATE, True),
        (Ctime.UNKNOWN, LATE, EARLY, False),  # a time of birth looks so
        (Ctime.UNKNOWN, EARLY, WHOLE, False),
        (Ctime.UNKNOWN, -5, 0, False),
        (Ctime.NONE, EARLY, LATE, False),
        (Ctime.NONE, LATE, LATE, False),
    ],
)
def test_times_count_by_kind_and_by_their_order(kind, mtime, ctime, shown):
    assert shows_changes(kind, FileStamp(1, 2, 3, mtime, ctime)) is shown


class _Statfs(ctypes.Structure):
    """`struct statfs` of macOS with 64-bit inodes, from <sys/mount.h>."""

    _fields_ = [
        ("f_bsize", ctypes.c_uint32), ("f_iosize", ctypes.c_int32), ("f_blocks", ctypes.c_uint64),
        ("f_bfree", ctypes.c_uint64), ("f_bavail", ctypes.c_uint64), ("f_files", ctypes.c_uint64),
        ("f_ffree", ctypes.c_uint64), ("f_fsid", ctypes.c_int32 * 2), ("f_owner", ctypes.c_uint32),
        ("f_type", ctypes.c_uint32), ("f_flags", ctypes.c_uint32), ("f_fssubtype", ctypes.c_uint32),
        ("f_fstypename", ctypes.c_char * 16), ("f_mntonname", ctypes.c_char * 1024),
        ("f_mntfromname", ctypes.c_char * 1024), ("f_flags_ext", ctypes.c_uint32),
        ("f_reserved", ctypes.c_uint32 * 7),
    ]  # fmt: skip


@pytest.mark.parametrize("symbol", ["fstatfs", "fstatfs$INODE64"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [(b"apfs", Ctime.LOCAL), (b"hfs", Ctime.WEAK), (b"nfs", Ctime.WEAK), (b"smbfs", Ctime.UNKNOWN),
     (b"msdos", Ctime.NONE), (b"exfat", Ctime.NONE), (b"macfuse", Ctime.UNKNOWN)],
)  # fmt: skip
def test_on_macos_statfs_names_the_type(monkeypatch, symbol, name, kind):
    class Library:
        def __init__(self, path):
            assert path is None

        def __getattr__(self, expected):
            if expected != symbol:
                raise AttributeError(expected)
            return self.call

        @staticmethod
        def call(fd, buffer):
            assert len(buffer) > ctypes.sizeof(_Statfs)
            ctypes.memmove(buffer, bytes(_Statfs(f_fstypename=name)), ctypes.sizeof(_Statfs))
            return 0 if fd == 5 else -1

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert ctime_kind(5, 1, 1) is kind
    assert ctime_kind(6, 2, 1) is Ctime.UNKNOWN  # the call fails


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tmpfs", True), ("ramfs", True), ("ext4", False), ("overlay", False), ("unknown-fs", False),
     ("hugetlbfs", False), ("fuse", False)],
)  # fmt: skip
def test_the_mount_decides_whether_files_are_in_memory(proc, name, expected):
    proc[0].update({7: "ext4 /dev/sda rw", 8: f"{name} none rw,size=1k", 88: "ext4 /dev/sda rw"})
    assert is_in_memory(8) is expected
    assert not is_in_memory(7)


def test_files_of_an_unknown_mount_are_not_in_memory(proc, monkeypatch):
    assert not is_in_memory(8)  # not listed
    proc[0][8] = "tmpfs"
    assert not is_in_memory(8)

    def refuse(*_):
        raise FileNotFoundError  # no /proc

    monkeypatch.setattr(filesystems, "open", refuse, raising=False)
    assert not is_in_memory(8)


def test_macos_is_not_asked_whether_files_are_in_memory(proc, monkeypatch):
    proc[0][8] = "tmpfs none rw"
    assert is_in_memory(8)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not is_in_memory(8)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_a_real_mount_says_whether_its_files_are_in_memory():
    with open("/proc/self/mounts") as file:  # by another way than by mount id
        kinds = {row.split()[1]: row.split()[2] for row in file}
    assert kinds["/proc"] == "proc"
    with open("/proc/self/status") as file:
        assert not is_in_memory(file.fileno())
    if kinds.get("/dev/shm") != "tmpfs" or not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs is mounted at /dev/shm")
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        assert is_in_memory(file.fileno())


@LINUX_ROOT
def test_files_of_a_disk_image_are_not_in_memory_though_it_lies_there(tmp_path):
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "x").write_bytes(b"x")
    (tmp_path / "at-image").mkdir()
    (tmp_path / "at-tmpfs").mkdir()
    with mounted("-t", "tmpfs", "none", tmp_path / "at-tmpfs") as tmpfs:
        image = squashed(tmp_path / "lower", tmpfs / "image")
        with image.open("rb") as file:
            assert is_in_memory(file.fileno())
        with mounted("-o", "loop,ro", image, tmp_path / "at-image") as squashfs:
            with (squashfs / "x").open("rb") as file:
                assert not is_in_memory(file.fileno())


@LINUX_ROOT
def test_real_mounts_have_their_kinds(tmp_path):
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "x").write_bytes(b"x")
    image = squashed(tmp_path / "lower", tmp_path / "image")
    for name in ("tmpfs", "image", "upper", "work", "over"):
        (tmp_path / f"at-{name}").mkdir()
    with mounted("-t", "tmpfs", "none", tmp_path / "at-tmpfs") as tmpfs:
        assert kind_of(tmpfs) is Ctime.LOCAL
        for name in ("lower", "upper", "work", "over"):
            (tmpfs / name).mkdir()
        (tmpfs / "lower" / "x").write_bytes(b"x")
        with mounted("-o", "loop,ro", image, tmp_path / "at-image") as squashfs:
            assert kind_of(squashfs / "x") is Ctime.NONE
            for lower, kind in ((squashfs, Ctime.NONE), (tmpfs / "lower", Ctime.LOCAL)):
                options = f"lowerdir={lower},upperdir={tmpfs}/upper,workdir={tmpfs}/work"
                with mounted("-t", "overlay", "-o", options, "none", tmp_path / "at-over") as over:
                    assert kind_of(over / "x") is kind, lower
