"""What a file system is: whether it lies in memory, and how its ctime shows changes of a file.

    LOCAL    by the clock of this kernel, finer than a second
    WEAK     by the clock of another machine, or in whole seconds
    UNKNOWN  perhaps not at all: FUSE, 9p, virtiofs, SMB and every type not listed here
    NONE     not at all: FAT, and images, whose files get their ctime when the image is built

On an UNKNOWN file system a ctime later than the mtime proves that there is one: a file system
without a ctime shows the mtime instead. A ctime in whole seconds proves nothing, and on a LOCAL
file system it is not trusted: it was set by a program that builds images, such as mke2fs, which
sets the same one for every version of a file.
"""

from __future__ import annotations

import os
import sys
from enum import IntEnum

from .descriptor import FileStamp, closing


class Ctime(IntEnum):
    """How far the ctime of a file system can be trusted, the least first."""

    NONE = 0
    UNKNOWN = 1
    WEAK = 2
    LOCAL = 3


def _table(**names: str) -> dict[str, Ctime]:
    """Return the kind of each file system type, given the types of each kind."""
    return {name: Ctime[kind] for kind, types in names.items() for name in types.split()}


_LINUX = _table(
    LOCAL="ext4 xfs btrfs zfs f2fs bcachefs tmpfs",
    WEAK="ext2 ext3 nfs nfs4 ceph lustre gpfs beegfs ocfs2 gfs2",
    NONE="squashfs erofs iso9660 udf cramfs romfs vfat msdos exfat",
)
_MACOS = _table(LOCAL="apfs", WEAK="hfs nfs", NONE="msdos exfat cd9660 udf")
_IN_MEMORY = ("tmpfs", "ramfs")
_known: dict[tuple[int, int], Ctime] = {}


def ctime_kind(fd: int, device: int, fsid: int) -> Ctime:
    """Return how far the ctime of an open file can be trusted, by its file system's type.

    Args:
        fd: A file or a directory.
        device: Its `st_dev`.
        fsid: Its `f_fsid`. The result is cached by device and fsid for the life of the process.
    """
    key = device, fsid
    if key not in _known:
        try:
            _known[key] = _of_macos(fd) if sys.platform == "darwin" else _of_linux(fd)
        except (OSError, ValueError, StopIteration):  # /proc is absent or does not list the mount
            _known[key] = Ctime.UNKNOWN
    return _known[key]


def shows_changes(kind: Ctime, stamp: FileStamp) -> bool:
    """Return whether every change of a file alters its stamp, except writes through mmap.

    Args:
        kind: How far the ctime of its file system can be trusted.
        stamp: The stamp of the file.
    """
    if kind is Ctime.WEAK:
        return stamp.ctime_ns > 0
    if stamp.in_whole_seconds:
        return False
    return kind is Ctime.LOCAL or (kind is Ctime.UNKNOWN and stamp.ctime_ns > stamp.mtime_ns)


def is_in_memory(fd: int) -> bool:
    """Return whether the file system of an open file is known to keep its files in memory."""
    try:
        return sys.platform == "linux" and _mount(fd)[0] in _IN_MEMORY
    except (OSError, ValueError, StopIteration):
        return False


def _of_linux(fd: int) -> Ctime:
    """Return the kind of the mount that holds an open file."""
    name, options = _mount(fd)
    return _of_overlay(options) if name == "overlay" else _LINUX.get(name, Ctime.UNKNOWN)


def _mount(fd: int) -> tuple[str, str]:
    """Return the type and the options of the mount that holds an open file, from /proc."""
    # by mount id: on btrfs and overlay `st_dev` is not the device of any mount
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        mount = next(line.split()[1] for line in file if line.startswith(b"mnt_id:"))
    with open("/proc/self/mountinfo", "rb") as file:
        row = next(line for line in file if line.split(b" ", 1)[0] == mount)
    name, _, options = os.fsdecode(row).rstrip("\n").partition(" - ")[2].split(" ")
    return name, options


def _of_overlay(options: str) -> Ctime:
    """Return the kind of the worst layer; UNKNOWN where the layers are not visible."""
    pairs = [option.partition("=") for option in options.split(",")]
    layers = [
        path
        for key, _, paths in pairs
        if key in {"upperdir", "lowerdir", "lowerdir+", "datadir+"}
        for path in paths.split(":")
        if path  # `::` in lowerdir separates the data-only layers
    ]
    if "\\" in options or not all(path.startswith("/") for path in layers):
        return Ctime.UNKNOWN
    return min(map(_of_layer, layers), default=Ctime.UNKNOWN)


def _of_layer(path: str) -> Ctime:
    """Return the kind of the file system that holds an overlay's layer."""
    with closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        return _of_linux(fd)


def _of_macos(fd: int) -> Ctime:
    """Return the kind of the file system that holds an open file, from `fstatfs`."""
    import ctypes  # slow to import, and needed on macOS only

    libc, status = ctypes.CDLL(None), ctypes.create_string_buffer(4096)
    # on Intel the name without suffix is the call for an older struct
    call = getattr(libc, "fstatfs$INODE64", None) or libc.fstatfs
    if call(fd, status):
        return Ctime.UNKNOWN
    name = status.raw[72:88].partition(b"\0")[0]  # f_fstypename, see <sys/mount.h>
    return _MACOS.get(name.decode("ascii", "replace"), Ctime.UNKNOWN)
