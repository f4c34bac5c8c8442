"""What a live run is writing survives every sweep: of another container, of another host, however
old it looks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.images import LINUX_ROOT
from tests.robustness.cuts import CUTS, write_tiny
from tests.robustness.harness import (
    CACHE,
    CONVERT,
    LOAD,
    Model,
    Running,
    assert_completes,
    assert_loads,
    one_line,
    process,
    undisturbed,
)

CUT = CUTS["between linears"]
CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc")
OTHER_HOST = ("unshare", "--uts", "sh", "-c", 'hostname other.example; exec "$@"', "sh")
OTHER_CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--uts",
                   "sh", "-c", 'hostname other.example; exec "$@"', "sh")  # fmt: skip
OTHER_RUNS = {
    "this host": (),
    "a container": CONTAINER,
    "another host": OTHER_HOST,
    "a container of another name": OTHER_CONTAINER,
}


def can(under) -> bool:
    """Whether programs may be run so here."""
    if under and not shutil.which(under[0]):
        return False
    return not subprocess.run([*under, "true"], capture_output=True).returncode


@contextlib.contextmanager
def stopped(model: Model, drop: bool, at: int, match: str):
    """A run that has stopped while it writes, until the body has ended; gives its temps."""
    until = model.directory.parent / "go on"
    fault = model.watched(do="pause", at=at, match=match, calls=["fsync", "pwrite"], until=until)
    running = model.start_drop(fault) if drop else model.start(fault=fault)
    assert running.wait_for_fault(), "it never wrote"
    temps = [Path(name) for name in model.temps]
    assert temps, "it was not writing a temp"
    try:
        yield running, temps
    finally:
        until.touch()


def age(temps: list[Path]) -> None:
    """Two days without a change, by the clock of the file system."""
    then = time.time() - 2 * 24 * 3600
    for temp in temps:
        os.utime(temp, (then, then))


def ended_well(running: Running) -> None:
    ended = running.wait()
    assert ended.code == 0, one_line(ended)


def sweep(model: Model, under, other: Path, module: str = CONVERT) -> None:
    """What another run does on the same cache: it begins or ends by a sweep."""
    where = ("--cache-dir", model.cache)
    arguments = {
        CONVERT: (other, *where, "--quiet"),
        LOAD: (other, *where),
        CACHE: ("prune", "--orphans", "-y", *where),
    }
    done = process(module, *arguments[module], under=under)
    assert "Traceback" not in done.err, done.err
    assert module != CONVERT or done.code == 0, done.err


def swept(place: Path, other: str, drop: bool, old: bool, modules=(CONVERT,)) -> None:
    """Asserts that a run that has stopped while it writes is not harmed by another run."""
    under = OTHER_RUNS[other]
    if not can(under):
        pytest.skip(f"{under[0]} is not allowed here")
    model = Model(write_tiny(place / "model", CUT), place / "cache")
    other = write_tiny(place / "other", CUT, seed=1)
    right = undisturbed(model)
    with stopped(model, drop, 2, r"fsync .*/tmp/") as (running, temps):
        if old:
            age(temps)
        for module in modules:
            sweep(model, under, other, module)
        assert all(temp.exists() for temp in temps), "swept away under its writer"
    ended_well(running)
    assert_loads(model, right)
    if drop:
        assert_completes(model, right)


@LINUX_ROOT
def test_a_live_drops_temps_survive_a_containers_sweep(place):
    swept(place, "a container", drop=True, old=False)


@LINUX_ROOT
def test_old_temps_of_a_live_drop_survive_another_hosts_sweep(place):
    swept(place, "another host", drop=True, old=True)


@pytest.mark.long
@LINUX_ROOT
@pytest.mark.parametrize("old", [False, True], ids=["young", "two days old"])
@pytest.mark.parametrize("drop", [False, True], ids=["convert", "drop"])
@pytest.mark.parametrize("other", OTHER_RUNS)
def test_what_a_live_run_writes_survives_every_sweep_from(place, other, drop, old):
    swept(place, other, drop, old, (CONVERT, LOAD, CACHE))


def test_a_live_run_in_a_tree_beside_the_model_keeps_its_temps(place):
    model = Model(write_tiny(place / "model", CUT), None)
    right = undisturbed(model)
    with stopped(model, False, 2, r"fsync .*/tmp/") as (running, temps):
        age(temps)
        loaded = model.load()
        assert "Traceback" not in loaded.err
        assert all(temp.exists() for temp in temps)
    ended_well(running)
    assert_completes(model, right)


def test_what_a_dead_run_was_writing_is_swept(place):
    """That sparing what lives does not mean to keep everything."""
    model = Model(write_tiny(place / "model", CUT), place / "cache")
    ended = model.drop(model.watched(do="kill", at=2, match=r"fsync .*/tmp/", calls=["fsync"]))
    assert ended.code == -9
    assert model.temps
    assert model.convert().code == 0
    assert not model.temps
