"""Power cuts: a disk's state copied while it is in use, mounted again, and looked at.

What was published before the cut is there whole; the rest is a miss, never wrong bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys

import pytest

from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.files import new_file
from paroquant_stream.store import entry_file
from tests.helpers.builders import cut_evenly, write_checkpoint

pytestmark = [
    pytest.mark.usefixtures("settled", "small_blocks"),
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0, reason="only root of Linux can mount images"
    ),
]
OPTIONS = ["defaults", "noauto_da_alloc,commit=1"]


@contextlib.contextmanager
def mounted(image, place, options: str = "defaults"):
    """The ext4 image mounted at `place`; the test is skipped where loop devices are not allowed."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-o", f"loop,{options}", image, place]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount an image: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def new_image(path):
    with path.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True, capture_output=True)
    return path


def published(cache) -> dict[str, str]:
    """Key -> SHA-256 of every entry there, by no code of the package."""
    paths = cache.rglob("entries/*/*.safetensors")
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Cuts:
    """Copies the image before and after every rename that publishes."""

    def __init__(self, image, patch) -> None:
        self.taken: list[tuple[object, set[str]]] = []
        self._image, self._done = image, set()
        real_replace = os.replace

        def publish(real, file, folder, name):
            stamp = real(file, folder, name)
            self._done |= {name.removesuffix(".safetensors")}
            self._cut()
            return stamp

        def replace(*names, **where):
            self._cut()
            real_replace(*names, **where)
            self._cut()

        for kind in (new_file.NewFile, entry_file.EntryFile):
            real = kind.publish
            patch.setattr(kind, "publish", lambda *given, real=real: publish(real, *given))
        patch.setattr(os, "replace", replace)

    def _cut(self) -> None:
        copy = self._image.with_name(f"cut{len(self.taken)}")
        shutil.copyfile(self._image, copy)
        self.taken.append((copy, set(self._done)))


def lost_after(model, tmp_path, options: str, golden, patch) -> list[str]:
    """What a conversion with cuts lost: published entries that are absent or wrong."""
    image = new_image(tmp_path / "image")
    lost = []
    with mounted(image, tmp_path / "disk", options) as disk:
        os.sync()
        with patch.context() as cutting:
            cuts = Cuts(image, cutting)
            convert(make_request(model, cache_dir=disk / "cache", jobs=1))
    assert len(cuts.taken) > 10
    for index, (copy, done) in enumerate(cuts.taken):
        subprocess.run(["fsck.ext4", "-p", copy], capture_output=True)  # replays the journal
        with mounted(copy, tmp_path / "after") as disk:
            found = published(disk / "cache")
            kept = {key for key in done if key in golden}
            lost += [f"cut {index}: {key[:8]}" for key in kept if found.get(key) != golden[key]]
            manifests = list((disk / "cache").rglob("manifests/*.msgpack"))
            if manifests and manifests[0].stat().st_size:
                lost += [f"cut {index}: manifest before {k[:8]}" for k in golden if k not in found]
            result = convert(make_request(model, cache_dir=disk / "cache", jobs=1))
            assert {record.key for record in result.manifest.entries} == golden.keys()
            assert published(disk / "cache") == golden, f"cut {index}"
        copy.unlink()
    return lost


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "model", cut=cut_evenly(2))


@pytest.fixture
def golden(model, tmp_path) -> dict[str, str]:
    convert(make_request(model, cache_dir=tmp_path / "golden", jobs=1))
    return published(tmp_path / "golden")


@pytest.mark.parametrize("options", [OPTIONS[0], pytest.param(OPTIONS[1], marks=pytest.mark.long)])
def test_what_was_published_survives_a_power_cut_at_any_rename(
    model, golden, tmp_path, monkeypatch, options
):
    assert lost_after(model, tmp_path, options, golden, monkeypatch) == []


def test_without_fsync_the_cuts_lose_entries(model, golden, tmp_path, monkeypatch):
    """That the harness can fail: the same run, every fsync a no-op."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert lost_after(model, tmp_path, OPTIONS[1], golden, monkeypatch) != []
