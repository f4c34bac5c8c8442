"""A shard that is another file by the time of its removal stays: only bytes that were converted go.

Whatever stands under the shard's name when the drop is over either has the bytes that the other
program put there, or those are what the model loads.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.robustness import cuts, faults
from tests.robustness.cuts import write_tiny
from tests.robustness.harness import (
    Fault,
    Model,
    Parameters,
    completes,
    differs,
    flip,
    holds,
    loads_right,
    scratch,
    sha256,
    undisturbed,
)

BY_NAME = """
os.replace({spare!r}, {shard!r})
open({done!r}, "w").close()
"""
"""As a download, an editor or `mv` does it."""
IN_PLACE = """
if os.path.exists({shard!r}):
    before = os.stat({shard!r})
    with open({spare!r}, "rb") as new, open({shard!r}, "r+b") as file:
        file.write(new.read())
    os.utime({shard!r}, ns=(before.st_atime_ns, before.st_mtime_ns))
    open({done!r}, "w").close()
"""
"""As rsync --inplace --times does it: the inode, the size and the mtime are as before."""
DIRECTORY = """
os.rename({directory!r}, {directory!r} + ".away")
os.rename({other!r}, {directory!r})
"""
"""Another model's directory under the path of this one."""


@dataclass(frozen=True)
class Exchange:
    """A model, and the same with other weights in one of its shards."""

    model: Model
    shard: Path
    place: Path
    """Where lie the other shard, `spare`, the first one, `original`, and a mark, `done`."""
    digest: str
    """Of the other shard."""
    old: Parameters
    """Of the model as it was."""
    new: Parameters
    """Of the model with the other shard."""

    def script(self, text: str) -> str:
        """The source of the exchange, at the moment that it is to happen."""
        names = {name: str(self.place / name) for name in ("spare", "done")}
        return text.format(shard=str(self.shard), **names)

    def problem(self) -> str:
        """What is wrong now that the drop is over; empty when nothing is."""
        if not (self.place / "done").exists():  # the shard was gone already
            return completes(self.model, self.old).why
        if holds(self.model.directory, self.digest):
            os.replace(self.place / "original", self.shard)
            return completes(self.model, self.old).why
        if not loads_right(self.model, self.new):
            return "the new file is gone, and its weights are not what the model loads"
        return ""


def exchange(
    place: Path, cut: str, number: int, known: tuple[Parameters, Parameters] | None
) -> Exchange:
    """A model cut so, with another shard of this number; `known`: its old and new parameters."""
    model = Model(write_tiny(place / "model", cuts.CUTS[cut]), place / "cache")
    other = write_tiny(place / "other", cuts.CUTS[cut], seed=1)
    name = model.sources[number]
    shutil.copy(other / name, place / "spare")
    shutil.copy2(model.directory / name, place / "original")
    if known is None:
        mixed = Model(Path(shutil.copytree(model.directory, place / "mixed")), place / "none")
        shutil.copy(other / name, mixed.directory / name)
        known = undisturbed(model), undisturbed(mixed)
    return Exchange(model, model.directory / name, place, sha256(other / name), *known)


@dataclass(frozen=True)
class Calls:
    """The calls of a drop that nothing disturbs, by number."""

    first: int
    """The first one on the shard."""
    aside: int
    """The one that takes its name, which is the last at which its times can be compared."""
    gone: int
    """The one that removes the shard, by whatever name it has by then."""
    last: int
    """Of all."""


def calls_of_a_drop(cut: str, number: int) -> Calls:
    """When a drop is at the shard of this number."""
    with scratch() as place:
        model = Model(write_tiny(place / "model", cuts.CUTS[cut]), place / "cache")
        shard, log = str(model.directory / model.sources[number]), place / "log"
        assert model.drop(model.watched(do="log", log=log, calls=faults.CALLS)).code == 0
        first, aside, gone, names = 0, 0, 0, {shard}
        lines = log.read_text().splitlines()
        for at, line in enumerate(lines, 1):
            _, call, *paths = line.split("\t")
            first = first or at * (shard in paths)
            if call in ("rename", "replace", "link") and paths[0] in names:
                names.add(paths[1])
                aside = aside or at
            if call in ("unlink", "remove") and paths[0] in names:
                gone = at
        assert gone, "the shard was never removed"
        return Calls(first, aside or gone, gone, len(lines))


def outcomes(cut: str, text: str, numbers: Sequence[int]) -> str:
    """What was wrong after the exchange at each of these calls."""
    wrong, known = [], None
    for at in numbers:
        with scratch() as place:
            it = exchange(place, cut, 1, known)
            known = it.old, it.new
            fault: Fault = {"do": "run", "script": it.script(text), "at": at}
            ended = it.model.drop(it.model.watched(**fault, calls=faults.CALLS))
            assert ended.fired, f"call {at} was never made"
            if why := it.problem():
                wrong.append(f"{ended.fired[0].replace(str(place), '')}: {why}")
    return "\n".join([f"wrong at {len(wrong)} of {len(numbers)} calls:", *wrong] if wrong else [])


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(BY_NAME, id="by name"),
        pytest.param(IN_PLACE, id="in place", marks=pytest.mark.long),
    ],
)
def test_a_shard_that_was_replaced_before_its_removal_stays(text):
    calls = calls_of_a_drop("between linears", 1)
    stop = beyond(calls, text)
    numbers = sorted({*range(calls.first, stop, 60), *range(stop - 2, stop)})
    assert not (wrong := outcomes("between linears", text, numbers)), wrong


def beyond(calls: Calls, text: str) -> int:
    """The number beyond the last call at which an exchange can be seen: of a file that is written
    in place between the last look at it and its removal cannot be noticed.
    """
    return calls.gone + 2 if text == BY_NAME else calls.aside


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cut", ["between linears", "a chain", "a cycle", "by size"])
@pytest.mark.parametrize("text", [BY_NAME, IN_PLACE], ids=["by name", "in place"])
def test_a_shard_that_was_replaced_at_any_call_stays(text, cut):
    calls = calls_of_a_drop(cut, 1)
    unseen = range(calls.aside, calls.gone + 1)
    numbers = [n for n in range(1, calls.last + 1) if text == BY_NAME or n not in unseen]
    assert not (wrong := outcomes(cut, text, numbers)), wrong


def test_another_model_under_the_path_keeps_its_shards(place):
    calls, lost = calls_of_a_drop("between linears", 1), []
    for at in range(calls.gone - 3, calls.gone + 1):
        run = place / str(at)
        model = Model(write_tiny(run / "model", cuts.CUTS["between linears"]), run / "cache")
        other = write_tiny(run / "other", cuts.CUTS["between linears"], seed=1)
        digests = [sha256(path) for path in sorted(other.glob("*.safetensors"))]
        script = DIRECTORY.format(directory=str(model.directory), other=str(other))
        fault = {"do": "run", "script": script, "at": at, "calls": faults.CALLS}
        assert model.drop(model.watched(**fault)).fired
        there = [sha256(path) for path in sorted(model.directory.glob("*.safetensors"))]
        if there != digests:
            lost.append(at)
    assert not lost, f"at {len(lost)} of 4 calls"


def test_a_write_through_mmap_is_seen_before_the_removal(place):
    """The digest cache knows the file by its stat, which is as before; only its bytes differ."""
    model = Model(write_tiny(place / "model"), place / "cache")
    shard = model.directory / model.sources[1]
    with shard.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[-1] = view[-1]  # the page is dirty from now on: no later store changes a time
        assert model.convert(fault={"clock": 60}).code == 0
        before = os.stat(shard)
        view[-1] ^= 1
        after = os.stat(shard)
        if (before.st_mtime_ns, before.st_ctime_ns) != (after.st_mtime_ns, after.st_ctime_ns):
            pytest.skip("this file system shows a store through mmap")
        changed = sha256(shard)
        model.drop(fault={"clock": 60})
    stays_or_loads(model, shard, changed)


def stays_or_loads(model: Model, shard: Path, digest: str) -> None:
    """The shard with these bytes is there, or its weights are what the model loads."""
    if shard.exists():
        assert sha256(shard) == digest
        return
    backup = write_tiny(model.directory.parent / "backup")
    flip(backup / shard.name, 1)
    assert sha256(backup / shard.name) == digest
    right = undisturbed(replace(model, directory=backup))
    assert loads_right(model, right), "the shard is gone, and its weights are not what loads"


@pytest.mark.long
def test_a_shard_overwritten_with_its_time_restored_stays(place):
    model = Model(write_tiny(place / "model"), place / "cache")
    assert model.convert(fault={"clock": 60}).code == 0
    shard = model.directory / model.sources[1]
    before = os.stat(shard)
    flip(shard, 1)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = sha256(shard)
    model.drop(fault={"clock": 60})
    stays_or_loads(model, shard, changed)


def test_a_blob_whose_name_is_not_its_hash_is_not_removed_unread(place):
    """A file that was damaged, or edited, after the Hub's client had named it."""
    plain = Model(write_tiny(place / "plain"), place / "cache")
    assert plain.convert().code == 0
    snapshot = cuts.as_snapshot(place, plain.directory)
    model = Model(snapshot, place / "cache")
    shard = snapshot / model.sources[1]
    flip(Path(os.path.realpath(shard)), 1)
    changed = sha256(shard)
    ended = model.drop()
    there = holds(snapshot.parent.parent, changed)
    assert there, f"removed without a look at it: exit code {ended.code}"
    assert differs(plain, undisturbed(plain)) == ""
