"""A flipped bit in the only copy: reported, kept, and repaired by the shard; never loaded, never
deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.robustness.cuts import CUTS, write_tiny
from tests.robustness.harness import (
    Model,
    Parameters,
    assert_completes,
    assert_loads,
    completes,
    differs,
    flip,
    holds,
    one_line,
    parameters,
    prune,
    put_back,
    scratch,
    sha256,
    undisturbed,
)

KEPT = pytest.mark.new("a damaged only copy of weights is kept")


@dataclass(frozen=True)
class Dropped:
    """A model whose shards are gone, what it loads, and a copy of its shards elsewhere."""

    model: Model
    right: Parameters
    backup: Path


def dropped(place: Path, cut: str = "a chain", in_place: bool = False) -> Dropped:
    directory = write_tiny(place / "model", CUTS[cut])
    model = Model(directory, None if in_place else place / "cache")
    right = undisturbed(model)
    backup = Path(shutil.copytree(directory, place / "backup"))
    ended = model.drop()
    assert ended.code == 0, ended.err
    assert not model.sources
    return Dropped(model, right, backup)


def usual_commands(model: Model) -> list[str]:
    """What a user may try with a damaged model; how each ended."""
    tries = {
        "load": model.load,
        "load verify=full": lambda: model.load("--verify", "full"),
        "convert": model.convert,
        "drop": model.drop,
        "convert --force": lambda: model.convert("--force"),
        "verify": lambda: model.command("verify"),
        "ls": lambda: model.command("ls"),
        "prune": lambda: prune(model),
        "prune --orphans": lambda: prune(model, "--orphans"),
        "prune --max-size": lambda: prune(model, "--max-size", "1B"),
        "prune --older-than": lambda: prune(model, "--older-than", "1s"),
        "load again": model.load,
    }
    outcomes = []
    for name, run in tries.items():
        ended = run()
        assert "Traceback" not in ended.err, f"{name}: {ended.err}"
        outcomes.append(f"{name}: {one_line(ended)}")
    return outcomes


@KEPT
@pytest.mark.parametrize(
    "at", [0.7, *(pytest.param(at, marks=pytest.mark.long) for at in (0, 0.001, 0.3, 1))]
)
def test_a_flipped_bit_in_the_only_copy_is_kept_and_repaired(place, at):
    it = dropped(place)
    entry = it.model.entries[1]
    flip(entry, at)
    damaged = sha256(entry)
    loaded = it.model.load()
    assert loaded.code == 1, "the damage was loaded"
    assert entry.stem in loaded.err, one_line(loaded)
    assert "Traceback" not in loaded.err
    outcomes = usual_commands(it.model)
    kept = holds(it.model.root, damaged)
    assert kept, "the only copy is gone: " + "\n".join(line[:120] for line in outcomes)
    put_back(it.model, it.backup)
    assert it.model.convert().code == 0
    assert_loads(it.model, it.right)


@KEPT
@pytest.mark.long
def test_a_damaged_copy_is_kept_by_each_command_alone(place):
    """That no single one of them deletes it, whichever comes first."""
    it, gone = dropped(place), []
    entry = it.model.entries[1]
    flip(entry, 0.7)
    damaged = sha256(entry)
    saved = place / "saved"
    shutil.copytree(it.model.root, saved)
    for name, run in {
        "load": it.model.load,
        "convert": it.model.convert,
        "drop": it.model.drop,
        "verify": lambda: it.model.command("verify"),
        "prune": lambda: prune(it.model),
        "prune --orphans": lambda: prune(it.model, "--orphans"),
        "prune --max-size 1B": lambda: prune(it.model, "--max-size", "1B"),
    }.items():
        run()
        it.model.convert()  # which begins by a sweep of tmp
        if not holds(it.model.root, damaged):
            gone.append(name)
        shutil.rmtree(it.model.root)
        shutil.copytree(saved, it.model.root)
    assert not gone


@KEPT
def test_a_damaged_copy_of_a_tree_beside_the_model_is_kept(place):
    it = dropped(place, in_place=True)
    entry = it.model.entries[1]
    flip(entry, 0.7)
    damaged = sha256(entry)
    assert it.model.load().code == 1
    it.model.convert()
    it.model.drop()
    kept = holds(it.model.directory, damaged)
    assert kept
    put_back(it.model, it.backup)
    assert it.model.convert().code == 0
    assert_loads(it.model, it.right)


@pytest.mark.long
def test_a_truncated_only_copy_is_reported_and_repaired(place):
    it = dropped(place)
    entry = it.model.entries[0]
    os.truncate(entry, entry.stat().st_size // 2)
    assert it.model.load().code == 1
    put_back(it.model, it.backup)
    assert it.model.convert().code == 0
    assert_loads(it.model, it.right)


def test_only_the_shard_of_the_damage_has_to_be_put_back(place):
    it = dropped(place, "between linears")
    entry = it.model.entries[1]
    shards = json.loads(it.model.drop().out)["shards"]
    name = next(shard["shard"] for shard in shards if shard["key"] == entry.stem)
    flip(entry, 0.7)
    assert it.model.load().code == 1
    shutil.copy2(it.backup / name, it.model.directory)
    assert it.model.convert().code == 0
    assert_loads(it.model, it.right)
    assert_completes(it.model, it.right)


def bad_reads(in_place: bool, stride: int) -> tuple[int, list[str]]:
    """How many loads had one bad read of the cache, and what it did."""
    wrong, fired, at = [], 0, 1
    with scratch() as place:
        it = dropped(place, in_place=in_place)
        saved = Path(shutil.copytree(it.model.root, place / "saved"))
        while True:
            shutil.rmtree(it.model.root)
            shutil.copytree(saved, it.model.root)  # new stamps: nothing is known, all is hashed
            loaded = it.model.load(fault={"under": [it.model.root], "bad_read": at})
            if not loaded.fired:
                return fired, wrong
            fired, what = fired + 1, loaded.fired[0].replace(str(place), "")
            found = parameters(loaded)
            if found is None:
                wrong.append(f"{what}: refused: {one_line(loaded)}")
            elif found != it.right:
                wrong.append(f"{what}: WRONG parameters")
            if why := differs(it.model, it.right):
                wrong.append(f"{what}: afterwards {why}")
            at += stride


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("in_place", [False, True], ids=["cache", "in place"])
@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.long)])
def test_one_bad_read_of_a_dropped_model_loses_nothing(in_place, stride):
    """What was read wrong is read again before it counts as damaged."""
    fired, wrong = bad_reads(in_place, stride)
    assert fired >= 3
    assert not wrong, f"{fired} bad reads:\n" + "\n".join(wrong)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("clock", [60, pytest.param(0, marks=pytest.mark.long)])
@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.long)])
def test_one_bad_read_inside_a_drop_loses_nothing(stride, clock):
    """Of a shard or of an entry that is read back: one more run completes the model. With the clock
    ahead, files count as left alone, and what was read once is remembered.
    """
    at, fired, wrong = 4, 0, []
    while True:
        with scratch() as place:
            model = Model(write_tiny(place / "model", CUTS["by size"]), place / "cache")
            right = undisturbed(model)
            ended = model.drop(model.watched(bad_read=at, clock=clock))
            if not ended.fired:
                break
            fired, what = fired + 1, ended.fired[0].replace(str(place), "")
            if ended.code not in (0, 1) or "Traceback" in ended.err:
                wrong.append(f"{what}: ended badly: {one_line(ended)}")
            if not (verdict := completes(model, right)):
                wrong.append(f"{what}: ({ended.code}) {verdict.why}")
        at += stride
    assert fired >= 3
    assert not wrong, f"{len(wrong)} of {fired}:\n" + "\n".join(wrong)


def converted(place: Path) -> tuple[Model, Parameters]:
    """A model with all its shards, converted."""
    model = Model(write_tiny(place / "model", CUTS["a chain"]), place / "cache")
    right = undisturbed(model)
    assert model.convert(fault={"clock": 60}).code == 0
    return model, right


def quietly_damaged(model: Model) -> Path:
    """An entry with a bit flipped and its mtime as it was."""
    entry = model.entries[1]
    before = os.stat(entry)
    flip(entry, 0.7)
    os.utime(entry, ns=(before.st_atime_ns, before.st_mtime_ns))
    return entry


@pytest.mark.parametrize("drop", [False, True], ids=["converted", "dropped"])
@pytest.mark.parametrize("how", ["the directory is moved", "the manifest is lost"])
def test_a_damaged_entry_without_its_record_is_not_trusted(place, how, drop):
    model, right = converted(place)
    quietly_damaged(model)
    if how == "the directory is moved":
        model = model.moved(place / "moved")
    else:
        for path in (model.root / "v1" / "manifests").iterdir():
            path.unlink()
    ended = model.drop() if drop else model.convert()
    assert ended.code in (0, 1)
    assert_loads(model, right)
    assert_completes(model, right)


def states_in_a_listing(model: Model) -> list[str]:
    ended = model.command("ls", "--json", model.directory)
    assert ended.code == 0, ended.err
    return [shard["state"] for row in json.loads(ended.out) for shard in row["shards"]]


def test_damage_that_verify_found_is_not_called_reused_or_fresh(place):
    model, right = converted(place)
    time.sleep(2.1)  # a younger file's times are not relied on
    assert model.convert().code == 0
    assert states_in_a_listing(model) == ["fresh"] * 4
    quietly_damaged(model)
    found = model.command("verify")
    assert found.code == 1
    assert set(states_in_a_listing(model)) != {"fresh"}
    done = model.convert()
    actions = [shard["action"] for shard in json.loads(done.out)["shards"]]
    assert actions.count("converted") == 1
    assert model.command("verify").code == 0
    assert_loads(model, right)


def test_damage_found_by_verify_is_not_called_fresh(place):
    it = dropped(place)
    flip(it.model.entries[1], 0.7)
    assert it.model.command("verify").code == 1
    states = states_in_a_listing(it.model)
    assert set(states) != {"fresh"}
    assert it.model.convert().code == 1
    assert it.model.command("verify").code == 1, "verify forgot it"


def test_damage_is_found_by_the_drop_before_the_shard_goes(place):
    model, right = converted(place)
    quietly_damaged(model)
    model.drop()
    assert_completes(model, right)
