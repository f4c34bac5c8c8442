"""A model of the Hub whose shards are dropped after their download: stopped anywhere, one more run
completes it, and no shard that was removed is downloaded twice.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.loopback_hub import LoopbackHub
from tests.robustness.cuts import CUTS, write_tiny
from tests.robustness.harness import (
    CONVERT,
    LOAD,
    Ended,
    Model,
    Parameters,
    faulty,
    one_line,
    parameters,
    process,
    undisturbed,
)

REPO = "owner/name"
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


class Download:
    """A repository on a Hub, and where its model goes."""

    def __init__(self, place: Path, hub: LoopbackHub) -> None:
        self._place, self._hub = place, hub
        source = write_tiny(place / "source", CUTS["a chain"])
        self.right: Parameters = undisturbed(Model(source, None))
        hub.push(REPO, source)
        self._home = place / "hf"

    def begin_anew(self) -> None:
        """As on a machine that has never seen the model."""
        for path in (self._home, self._cache):
            shutil.rmtree(path, ignore_errors=True)
        self._hub.log.clear()

    @property
    def _cache(self) -> Path:
        return self._place / "cache"

    @property
    def _environment(self) -> dict[str, str]:
        return self._hub.environment(self._home)

    def drop(self, **fault: object) -> Ended:
        argv = (REPO, "--cache-dir", self._cache, "--jobs", 1, "--drop-source", "--quiet")
        if not fault:
            return process(CONVERT, *argv, **self._environment)
        what = {"under": [self._home, self._cache], **fault}
        return faulty(CONVERT, *argv, fault=what, **self._environment)

    def shards(self) -> set[str]:
        """Those that the Hub's cache has."""
        found = self._home.rglob("snapshots/*/*.safetensors")
        return {path.name for path in found if path.exists()}

    def downloads(self) -> Counter[str]:
        return Counter(self._hub.downloads())

    def load(self) -> Ended:
        return process(LOAD, REPO, "--cache-dir", self._cache, **self._environment)


@pytest.fixture
def download(place):
    with LoopbackHub() as hub:
        yield Download(place, hub)


def removals(log: Path) -> set[str]:
    """The shards that were removed, by the links that went last."""
    calls = [line.split("\t")[1:] for line in log.read_text().splitlines()]
    found = {Path(paths[0]).name for call, *paths in calls if call in ("unlink", "remove")}
    log.unlink()
    return {name for name in found if name.endswith(".safetensors") and "-of-" in name}


@pytest.mark.parametrize("stride", [8])
def test_killed_while_shards_come_and_go_the_next_run_completes(download, place, stride):
    at, fired, wrong, log = stride, 0, [], place / "log"
    while True:
        download.begin_anew()
        ended = download.drop(do="kill", at=at, log=log)
        if not ended.fired:
            assert ended.code == 0, one_line(ended)
            break
        assert ended.code == -9
        fired += 1
        removed = removals(log) - download.shards()
        rerun = download.drop()
        if rerun.code:
            wrong.append(f"{ended.fired}: the rerun fails: {one_line(rerun)}")
        elif download.shards():
            wrong.append(f"{ended.fired}: left {download.shards()}")
        elif parameters(loaded := download.load()) != download.right:
            wrong.append(f"{ended.fired}: {one_line(loaded)}")
        twice = {name for name in removed if download.downloads()[name] > 1}
        if twice:
            wrong.append(f"{ended.fired}: downloaded again: {twice}")
        at += stride
    assert fired >= 2
    assert not wrong, f"{len(wrong)} of {fired}:\n" + "\n".join(wrong)
