"""Which file systems keep a ctime that shows every change of a file, and by whose clock.

    LOCAL    by this kernel's clock, finer than a second
    KEPT     by the clock of another machine, or in whole seconds
    UNKNOWN  perhaps not: FUSE, 9p, virtiofs, SMB and whatever is not listed here
    NONE     images, which are stamped once when they are built, and FAT

Where that is unknown a file can prove it by a ctime that is later than its mtime: a file system
that has no ctime shows the mtime in its place. Whole seconds prove nothing, and on a LOCAL file
system disprove it: they come from a program that built an image (mke2fs does, too), which gives
every version of a file the same ones.
"""

from __future__ import annotations

import os
import sys
from enum import IntEnum

from .descriptor import FileStamp, closing


class Ctime(IntEnum):
    """What the ctime of files is worth on a file system, the least first."""

    NONE = 0
    UNKNOWN = 1
    KEPT = 2
    LOCAL = 3


def _table(**names: str) -> dict[str, Ctime]:
    return {name: Ctime[kind] for kind, listed in names.items() for name in listed.split()}


_LINUX = _table(
    LOCAL="ext4 xfs btrfs zfs f2fs bcachefs tmpfs",
    KEPT="ext2 ext3 nfs nfs4 ceph lustre gpfs beegfs ocfs2 gfs2",
    NONE="squashfs erofs iso9660 udf cramfs romfs vfat msdos exfat",
)
_MACOS = _table(LOCAL="apfs", KEPT="hfs nfs", NONE="msdos exfat cd9660 udf")
_known: dict[tuple[int, int], Ctime] = {}


def ctime_kind(fd: int, device: int, fsid: int) -> Ctime:
    """Return what the ctime of an open file is worth, by the type of its file system.

    Args:
        fd: The file, or a directory.
        device: Its `st_dev`.
        fsid: Its `f_fsid`. The answer is kept by device and fsid for as long as the process lives.
    """
    key = device, fsid
    if key not in _known:
        try:
            _known[key] = _of_macos(fd) if sys.platform == "darwin" else _of_linux(fd)
        except (OSError, ValueError, StopIteration):  # no /proc, or one that does not say it
            _known[key] = Ctime.UNKNOWN
    return _known[key]


def shows_changes(kind: Ctime, stamp: FileStamp) -> bool:
    """Return whether every change of a file but one through mmap alters its stamp."""
    if kind is Ctime.KEPT:
        return stamp.ctime_ns > 0
    if stamp.in_whole_seconds:
        return False
    return kind is Ctime.LOCAL or (kind is Ctime.UNKNOWN and stamp.ctime_ns > stamp.mtime_ns)


def _of_linux(fd: int) -> Ctime:
    # by the mount's number: on btrfs and overlay no mount has the device that `stat` shows
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        mount = next(line.split()[1] for line in file if line.startswith(b"mnt_id:"))
    with open("/proc/self/mountinfo", "rb") as file:
        row = next(line for line in file if line.split(b" ", 1)[0] == mount)
    name, _, options = os.fsdecode(row).rstrip("\n").partition(" - ")[2].split(" ")
    return _of_overlay(options) if name == "overlay" else _LINUX.get(name, Ctime.UNKNOWN)


def _of_overlay(options: str) -> Ctime:
    """Return that of the worst layer; what cannot be seen, as in a container, is unknown."""
    pairs = [option.partition("=") for option in options.split(",")]
    layers = [
        path
        for key, _, paths in pairs
        if key in {"upperdir", "lowerdir", "lowerdir+", "datadir+"}
        for path in paths.split(":")
        if path  # an empty one stands before layers that hold data alone
    ]
    if "\\" in options or not all(path.startswith("/") for path in layers):
        return Ctime.UNKNOWN
    return min(map(_of_layer, layers), default=Ctime.UNKNOWN)


def _of_layer(path: str) -> Ctime:
    with closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        return _of_linux(fd)


def _of_macos(fd: int) -> Ctime:
    import ctypes  # 3 ms, which Linux saves

    libc, status = ctypes.CDLL(None), ctypes.create_string_buffer(4096)
    # on Intel the plain name is that of an older structure
    call = getattr(libc, "fstatfs$INODE64", None) or libc.fstatfs
    if call(fd, status):
        return Ctime.UNKNOWN
    name = status.raw[72:88].partition(b"\0")[0]  # f_fstypename, see <sys/mount.h>
    return _MACOS.get(name.decode("ascii", "replace"), Ctime.UNKNOWN)
