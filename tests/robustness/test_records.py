"""What is kept of a dropped model beside its entries: any one file of it may be lost or damaged,
the model may move, its old path may get another one; the weights are found all the same.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.robustness.cuts import CUTS, write_tiny
from tests.robustness.harness import (
    Model,
    Parameters,
    assert_loads,
    differs,
    flip,
    one_line,
    prune,
    scratch,
    snapshot,
    undisturbed,
)

pytestmark = pytest.mark.new("records of dropped shards are kept twice and found by identity")


def dropped(place: Path, name: str = "model", *, seed: int = 0, cache: str | None = "cache",
            cut: str = "between linears") -> tuple[Model, Parameters]:  # fmt: skip
    """A model whose shards are gone, and what it loads."""
    directory = write_tiny(place / name, CUTS[cut], seed=seed)
    model = Model(directory, place / cache if cache else None)
    right = undisturbed(model)
    ended = model.drop()
    assert ended.code == 0, ended.err
    assert not model.sources
    return model, right


def records(model: Model, all_of_a_kind: bool = True) -> list[Path]:
    """Every file that the drop left and that is no entry, or one of each directory; in the model's
    own directory, those that no checkpoint has.
    """
    below = [path for path in model.root.rglob("*") if path.is_file()]
    beside = [path for path in model.directory.iterdir() if path.is_file()]
    found = {p for p in below if p not in model.entries} | {p for p in beside if not is_known(p)}
    kinds = {path.parent: path for path in sorted(found, reverse=True)}
    return sorted(found if all_of_a_kind else kinds.values())


def is_known(path: Path) -> bool:
    """Whether every checkpoint has such a file."""
    return path.suffix == ".json" and path.name.startswith(("config", "tokenizer", "model"))


class Saved:
    """A model's directory and cache as they were, to be put back again and again."""

    def __init__(self, model: Model, place: Path) -> None:
        self._pairs = [(model.directory, place / "saved model")]
        if model.cache:
            self._pairs.append((model.cache, place / "saved cache"))
        for path, copy in self._pairs:
            shutil.copytree(path, copy)

    def put_back(self) -> None:
        for path, copy in self._pairs:
            shutil.rmtree(path)
            shutil.copytree(copy, path)


def harmed(harm: str, in_place: bool, all_of_a_kind: bool) -> tuple[int, list[str]]:
    """Of how many files each one was harmed by itself, and after which the model did not load."""
    with scratch() as place:
        model, right = dropped(place, cache=None if in_place else "cache")
        found, wrong, saved = records(model, all_of_a_kind), [], Saved(model, place)
        for path in found:
            if path.stat().st_size or harm == "all of it":
                HARMS[harm](path)
            if why := differs(model, right):
                wrong.append(f"{path.relative_to(place)}: {why}")
            elif (rerun := model.drop()).code:
                wrong.append(f"{path.relative_to(place)}: the rerun fails: {one_line(rerun)}")
            elif why := differs(model, right):
                wrong.append(f"{path.relative_to(place)}: after a rerun, {why}")
            saved.put_back()
        return len(found), wrong


HARMS = {
    "its first byte": lambda path: flip(path, 0),
    "a byte in its middle": lambda path: flip(path, 0.5, bit=3),
    "its last byte": lambda path: flip(path, 1, bit=7),
    "all of it": lambda path: path.unlink(),
    "all its bytes": lambda path: path.write_bytes(b""),
}


IN_PLACE = pytest.mark.parametrize("in_place", [False, True], ids=["cache", "in place"])


@pytest.mark.parametrize(
    ("harm", "in_place"), [("a byte in its middle", False), ("all of it", True)]
)
def test_one_record_of_each_kind_may_be_lost(harm, in_place):
    count, wrong = harmed(harm, in_place, all_of_a_kind=False)
    assert count >= 2
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


@pytest.mark.long
@pytest.mark.timeout(600)
@IN_PLACE
@pytest.mark.parametrize("harm", list(HARMS))
def test_any_one_record_may_be_lost(harm, in_place):
    count, wrong = harmed(harm, in_place, all_of_a_kind=True)
    assert count >= 2
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "harm", ["all of it", pytest.param("a byte in its middle", marks=pytest.mark.long)]
)
def test_after_a_lost_record_prune_removes_nothing_needed(place, harm):
    model, right = dropped(place)
    saved, wrong = Saved(model, place), []
    for path in records(model, all_of_a_kind=False):
        if path.stat().st_size or harm == "all of it":
            HARMS[harm](path)
        prune_by_every_rule(model)
        if why := differs(model, right):
            wrong.append(f"{path.relative_to(place)}: {why}")
        saved.put_back()
    assert not wrong, "\n".join(wrong)


def prune_by_every_rule(model: Model) -> None:
    for rule in ((), ("--orphans",), ("--max-size", "1B"), ("--older-than", "1s")):
        prune(model, *rule)


def copied(model: Model, to: Path) -> Model:
    shutil.copytree(model.directory, to)
    shutil.rmtree(model.directory)
    return replace(model, directory=to)


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(Model.moved, id="renamed"),
        pytest.param(copied, id="copied", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "in place"])
def test_a_dropped_model_is_found_after_its_directory_moved(place, cached, move):
    model, right = dropped(place, cache="cache" if cached else None)
    model = move(model, place / "moved")
    assert_loads(model, right)
    assert model.drop().code == 0
    assert_loads(model, right)


@pytest.mark.long
def test_a_dropped_model_is_found_through_a_link(place):
    model, right = dropped(place)
    (place / "link").symlink_to(model.directory)
    assert_loads(replace(model, directory=place / "link"), right)


def test_a_prune_after_the_move_deletes_nothing_that_is_needed(place):
    model, right = dropped(place)
    model = model.moved(place / "moved")
    before = len(model.entries)
    prune_by_every_rule(model)
    assert len(model.entries) == before
    assert_loads(model, right)


@pytest.mark.parametrize(
    ("same", "drop"), [(True, True), (False, False)], ids=["same config, dropped", "other config"]
)
def test_its_path_may_get_another_model(place, same, drop):
    model, right = dropped(place)
    first = model.moved(place / "first")
    config = {} if same else {"rope_theta": 5000.0}
    write_tiny(model.directory, CUTS["between linears"], seed=1, **config)
    second = undisturbed(model)
    assert second != right
    assert (model.drop() if drop else model.convert()).code == 0
    prune(model, "--orphans")
    assert_loads(model, second)
    assert_loads(first, right)
    assert_loads(first.moved(place / "further"), right)


def test_its_shards_may_be_replaced_by_those_of_another_model(place):
    """New weights are copied into the directory, converted and dropped: they are what loads."""
    model, right = dropped(place)
    other = write_tiny(place / "other", CUTS["between linears"], seed=1)
    for path in other.glob("*.safetensors"):
        shutil.copy(path, model.directory)
    second = undisturbed(replace(model, directory=other))
    assert second != right
    assert model.drop().code == 0
    assert not model.sources
    assert_loads(model, second)


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(Model.moved, id="renamed"),
        pytest.param(copied, id="copied", marks=pytest.mark.long),
    ],
)
def test_two_fine_tunes_load_their_own_weights_after_a_move(place, move):
    one, first = dropped(place, "one", seed=0)
    two, second = dropped(place, "two", seed=1)
    assert first != second
    one, two = move(one, place / "one moved"), move(two, place / "two moved")
    assert_loads(one, first)
    assert_loads(two, second)
    prune(one, "--orphans")
    assert_loads(one, first)
    assert_loads(two, second)


def test_two_fine_tunes_that_swap_places_load_their_weights(place):
    one, first = dropped(place, "one", seed=0)
    two, second = dropped(place, "two", seed=1)
    one = one.moved(place / "aside")
    two = two.moved(place / "one")
    one = one.moved(place / "two")
    assert_loads(one, first)
    assert_loads(two, second)


@pytest.mark.long
def test_a_moved_model_never_loads_anothers_weights(place):
    """Where it is unknown whose weights they are, a message; never those of the other."""
    one, first = dropped(place, "one", seed=0)
    _, second = dropped(place, "two", seed=1)
    model = one.moved(place / "elsewhere")
    ended = model.load()
    found = json.loads(ended.out) if ended.code == 0 else None
    assert found != second
    assert found in (None, first)


@pytest.mark.long
def test_the_cache_may_move_too(place):
    model, right = dropped(place)
    (place / "cache").rename(place / "cache moved")
    assert_loads(replace(model, cache=place / "cache moved"), right)


def test_a_removal_leaves_what_another_model_shares(place):
    """Two directories of the same shards, both dropped: `rm` of the one keeps the other's."""
    one, right = dropped(place, "one")
    two, _ = dropped(place, "two")
    assert one.command("rm", one.directory).code == 0
    prune(two, "--orphans")
    assert_loads(two, right)


@pytest.mark.long
def test_a_removal_of_a_moved_model_removes_only_that(place):
    one, _ = dropped(place, "one", seed=0)
    two, second = dropped(place, "two", seed=1)
    one.command("rm", one.directory)
    assert_loads(two, second)


def test_a_load_of_a_dropped_model_changes_none_of_its_records(place):
    model, right = dropped(place)
    before = {path: path.read_bytes() for path in records(model)}
    beside = snapshot(model.directory)
    assert_loads(model, right)
    assert {path: path.read_bytes() for path in before} == before
    assert snapshot(model.directory) == beside
