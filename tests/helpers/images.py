"""Real file systems for tests: images that can be built again bit by bit, and mounts."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

STAMP = 1_700_000_000  # of every file in an image
LINUX_ROOT = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root of Linux can mount"
)


def call(*command: object) -> str:
    """Runs a command; skips the test, with the command's words, where the machine lacks it."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not there")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()}")
    return done.stdout.strip()


def squashed(directory: Path, image: Path) -> Path:
    """A squashfs of the directory: the same files, the same bytes."""
    times = ("-all-time", STAMP, "-mkfs-time", STAMP)
    call("mksquashfs", directory, image, "-quiet", "-no-progress", "-noappend", *times)
    return image


def eroded(directory: Path, image: Path) -> Path:
    """An erofs of the directory, its name and times always the same."""
    call(
        "mkfs.erofs", f"-T{STAMP}", "-U", "1" * 8 + "-1111-1111-1111-" + "1" * 12, image, directory
    )
    return image


def extended(directory: Path, image: Path) -> Path:
    """An ext4 of the directory; of its files the times are in whole seconds, always the same."""
    name = "1" * 8 + "-1111-1111-1111-" + "2" * 12
    blocks = f"{(sum(path.stat().st_size for path in directory.iterdir()) >> 10) + 8192}k"
    options = ("-U", name, "-E", f"hash_seed={name}")
    call("mke2fs", "-q", "-t", "ext4", "-d", directory, *options, image, blocks)
    for path in directory.iterdir():
        for field in ("ctime", "mtime"):
            call("debugfs", "-w", "-R", f"set_inode_field {path.name} {field} @{STAMP}", image)
            extra = f"set_inode_field {path.name} {field}_extra 0"
            call("debugfs", "-w", "-R", extra, image)
    return image


@contextlib.contextmanager
def mounted(*arguments: object) -> Iterator[Path]:
    """The last argument, where `mount` with all of them has mounted something, during the body."""
    call("mount", *arguments)
    try:
        yield Path(str(arguments[-1]))
    finally:
        subprocess.run(["umount", str(arguments[-1])], check=True)


@contextlib.contextmanager
def in_loop(image: Path, where: Path, device: str = "") -> Iterator[str]:
    """Mounts an image read-only through a loop device, a free one or this one; gives its name."""
    if device:
        call("losetup", "-r", device, image)
    else:  # found and taken at once: other tests need one too
        device = call("losetup", "-r", "-f", "--show", image)
    try:
        with mounted("-o", "ro", device, where):
            yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@contextlib.contextmanager
def without_ctime(source: Path, where: Path) -> Iterator[None]:
    """Shows a flat directory through a FUSE that has no ctime, during the body."""
    program = Path(__file__).with_name("tiny_fuse.py")
    command = [sys.executable, program, source, where]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as fuse:
        if not fuse.stdout.readline():
            pytest.skip(f"no FUSE here: {fuse.stderr.read().strip().splitlines()[-1]}")
        try:
            yield
        finally:
            subprocess.run(["umount", str(where)], check=True)
