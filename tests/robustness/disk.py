"""Small file systems: one that is full, and one whose image is copied while it is in use.

The copy is what a disk would hold if the power went at that moment: the kernel does not know.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.robustness.harness import Model

EXT4 = ("defaults", "noauto_da_alloc,commit=1")
STEPS = ("replace", "rename", "link", "symlink", "unlink", "remove", "fsync", "fdatasync", "mkdir")
"""After which the image is copied: what publishes, removes, or makes durable."""
COPY = """
import shutil, time
cut = {cuts!r} + "/%d" % event.number
os.mkdir(cut)
shutil.copyfile({image!r}, cut + "/image")
if {outside!r}:
    shutil.copytree({outside!r}, cut + "/model")
with open(cut + "/call", "w") as file:
    file.write(event.name + " " + " ".join(event.paths))
"""


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[Path]:
    """A mount for the body; the test is skipped where that is not allowed."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def memory(place: Path, size: str) -> Iterator[Path]:
    """A tmpfs of this size; `grow` makes it larger."""
    with mounted(place, "-t", "tmpfs", "-o", f"size={size},mode=700", "none") as found:
        yield found


def grow(place: Path, size: str) -> None:
    """Makes a tmpfs larger."""
    subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)


def new_image(path: Path, mebibytes: int = 16) -> Path:
    """An empty ext4 file system in a file."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed")
    with path.open("wb") as file:
        file.truncate(mebibytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True, capture_output=True)
    return path


def image_options(image: Path, options: str) -> tuple[str, ...]:
    """Those of `mount` for an image."""
    return ("-o", f"loop,{options}", str(image))


@dataclass(frozen=True)
class Cut:
    """A moment of a drop: the disk as it was, and what lay on other disks."""

    place: Path

    @property
    def call(self) -> str:
        return (self.place / "call").read_text()

    def repair(self) -> Path:
        """The image after the file system's journal was replayed."""
        image = self.place / "image"
        subprocess.run(["fsck.ext4", "-p", image], capture_output=True)
        return image

    def restore(self, model: Model) -> None:
        """Puts a model directory that is not in the image back to that moment."""
        if (self.place / "model").exists():
            shutil.rmtree(model.directory)
            os.rename(self.place / "model", model.directory)


def cuts_of_a_drop(
    model: Model, image: Path, cuts: Path, outside: bool, **more: object
) -> tuple[int, list[Cut]]:
    """Drops, and gives the exit code and the disk after every step. `outside`: the model's own
    directory lies on another disk, where what was removed is gone for good at once.
    """
    cuts.mkdir()
    directory = str(model.directory) if outside else ""
    script = COPY.format(cuts=str(cuts), image=str(image), outside=directory)
    more.setdefault("script", script)
    ended = model.drop(model.watched(do="run", after=True, calls=STEPS, **more))
    assert ended.fired
    taken = sorted(cuts.iterdir(), key=lambda path: int(path.name))
    return ended.code, [Cut(path) for path in taken]
