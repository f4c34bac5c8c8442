"""A FUSE that passes a flat directory through and keeps no ctime: it shows the mtime in its place.

    python tests/helpers/tiny_fuse.py SOURCE MOUNTPOINT

Read-only, in the kernel's own protocol (<linux/fuse.h>), so that it needs no library. Prints a line
when it is mounted, and ends when it is unmounted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from pathlib import Path

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, RELEASEDIR, ACCESS, INTERRUPT, BATCH_FORGET = 25, 26, 27, 29, 34, 36, 42
HEADER = struct.Struct("<IIQQIIII")
ROOT = 1


class Tiny:
    """The files of one directory, by the kernel's numbers for them."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._numbers = {"": ROOT}

    def answer(self, opcode: int, node: int, body: bytes) -> bytes | None:
        """The answer to one request; None for those that get none. Raises OSError."""
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            return None
        if opcode in (RELEASE, RELEASEDIR, FLUSH, ACCESS):
            return b""
        if opcode in (OPEN, OPENDIR):
            return struct.pack("<QII", 0, 0, 0)
        if opcode == INIT:
            _, minor, readahead, _ = struct.unpack_from("<IIII", body)
            form = (7, min(minor, 31), readahead, 0, 12, 9, 1 << 16, 1)
            return struct.pack("<IIIIHHII", *form).ljust(64, b"\0")
        if opcode == STATFS:
            return struct.pack("<QQQQQIIII", 1 << 30, 0, 0, 0, 0, 4096, 255, 4096, 0).ljust(
                80, b"\0"
            )
        if opcode == LOOKUP:
            name = os.fsdecode(body.rstrip(b"\0"))
            attributes = self._attributes(name)
            return struct.pack("<QQQQII", self._numbers[name], 0, 0, 0, 0, 0) + attributes
        if opcode == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self._attributes(self._name(node))
        if opcode == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            with open(self._source / self._name(node), "rb") as file:
                return os.pread(file.fileno(), size, offset)
        raise OSError(errno.ENOSYS, "not implemented")

    def _name(self, node: int) -> str:
        return next(name for name, number in self._numbers.items() if number == node)

    def _attributes(self, name: str) -> bytes:
        status = os.stat(self._source / name)
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        seconds, rest = divmod(status.st_mtime_ns, 10**9)
        mode = status.st_mode & ~0o222 if stat.S_ISREG(status.st_mode) else status.st_mode
        form = (
            number,
            status.st_size,
            status.st_blocks,
            seconds,
            seconds,
            seconds,
            rest,
            rest,
            rest,
        )
        form += (mode, 1, status.st_uid, status.st_gid, 0, 4096, 0)
        return struct.pack("<QQQQQQIIIIIIIIII", *form)


def mount(fd: int, where: str) -> None:
    """Mounts the FUSE that answers at `fd`. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if libc.mount(b"tiny", where.encode(), b"fuse.tiny", 2 | 4, options.encode()):  # nosuid, nodev
        raise OSError(ctypes.get_errno(), "cannot mount a FUSE here")


def main(source: str, where: str) -> int:
    """Serves until it is unmounted."""
    tiny, fd = Tiny(Path(source)), os.open("/dev/fuse", os.O_RDWR)
    mount(fd, where)
    sys.stdout.write("mounted\n")
    sys.stdout.flush()
    while True:
        try:
            request = os.read(fd, 1 << 18)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return 0
            if error.errno in (errno.EINTR, errno.ENOENT):
                continue
            raise
        _, opcode, unique, node, *_ = HEADER.unpack_from(request)
        try:
            code, data = 0, tiny.answer(opcode, node, request[HEADER.size :])
        except OSError as error:
            code, data = error.errno or errno.EIO, b""
        if data is not None:
            os.write(fd, struct.pack("<IiQ", 16 + len(data), -code, unique) + data)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
