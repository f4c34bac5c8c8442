"""Two commands at once: one of them completes the model, and none removes what the other needs."""

from __future__ import annotations

import functools
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.helpers.images import LINUX_ROOT
from tests.robustness.disk import mounted
from tests.robustness.harness import holds, scratch, sha256, snapshot
from tests.robustness.pairs import COMMANDS, PAIRS, Round, first_removal

REMOVALS = ("rm", "prune --orphans", "prune --max-size 1B")
CUTS = ["a chain", "a cycle", "by size", "by size into 7", "between linears"]
ENTRY = r"(unlink|remove|rename|replace) .*/entries/"
FEW = [
    ("drop", "drop into another cache"),
    ("drop", "prune --max-size 1B"),
    ("drop", "load"),
]


@functools.cache
def number_after_the_first_removal(name: str, converted: bool) -> int:
    with scratch() as place:
        return first_removal("a chain", place, COMMANDS[name], converted)


def a_round(place, first: str, second: str, cut: str = "a chain", jobs: int = 1) -> Round:
    converted = second in REMOVALS
    return Round(place, COMMANDS[first], COMMANDS[second], cut, jobs, converted)


@pytest.mark.parametrize(
    ("first", "second"),
    [pair if pair in FEW else pytest.param(*pair, marks=pytest.mark.long) for pair in PAIRS],
)
def test_another_command_during_a_drop_harms_nothing(place, first, second):
    round_ = a_round(place, first, second)
    at = number_after_the_first_removal(first, round_.converted)
    assert round_.one_stopped(0, at), "the drop never got there"
    assert not (why := round_.problem()), why


@pytest.mark.parametrize("second", ["rm", "prune --max-size 1B"])
def test_a_removal_stopped_early_keeps_what_a_drop_needs(place, second):
    """It had made up its mind; then a drop begins, and ends or waits for it."""
    round_ = a_round(place, "drop", second)
    assert round_.one_stopped(1, match=ENTRY), "it never removed an entry"
    assert not (why := round_.problem()), why


def test_two_drops_that_take_turns_complete_the_model():
    wrong = rounds("drop", "drop into another cache", (1, 3))
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("second", REMOVALS)
def test_a_removal_stopped_anywhere_keeps_what_a_drop_needs(second):
    at, wrong = 0, []
    while True:
        at += 1
        with scratch() as place:
            round_ = a_round(place, "drop", second)
            if not round_.one_stopped(1, at):
                break
            if why := round_.problem():
                wrong.append(f"stopped at call {at}: {why}".replace(str(place), ""))
    assert at > 3
    assert not wrong, f"{len(wrong)} of {at - 1} calls:\n" + "\n".join(wrong)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_hundred_rounds_of_two_commands_complete_the_model(first, second):
    wrong = rounds(first, second, range(200))
    assert not wrong, f"{len(wrong)} of 200 rounds:\n" + "\n".join(wrong[:20])


@pytest.mark.long
@LINUX_ROOT
@pytest.mark.timeout(3600)
def test_two_drops_through_a_bind_mount_complete_the_model():
    """A directory that is mounted twice is one directory, whatever its paths are."""
    wrong = []
    for seed in range(60):
        with scratch() as place, ExitStack() as stack:
            round_ = a_round(place, "drop", "drop through another path", CUTS[seed % 5], jobs=3)
            stack.enter_context(mounted(place / "same", "--bind", place / "model"))
            round_.in_turns(seed)
            if why := round_.problem():
                wrong.append(f"round {seed}: {why}".replace(str(place), ""))
    assert not wrong, f"{len(wrong)} of 60 rounds:\n" + "\n".join(wrong[:20])


def rounds(first: str, second: str, seeds) -> list[str]:
    """What was wrong with rounds of these seeds: odd ones in turns, in even ones one is stopped."""

    def one(seed: int) -> str:
        source = random.Random(seed)
        with scratch() as place:
            cut, jobs = source.choice(CUTS), source.choice([1, 3])
            round_ = a_round(place, first, second, cut, jobs if seed > 8 else 3)
            if seed % 2:
                round_.in_turns(seed)
            else:
                stopped = source.choice([0, 1])
                round_.one_stopped(stopped, source.randrange(1, 34 if stopped else 200))
            if why := round_.problem():
                return f"round {seed}, {cut}, {jobs} jobs: {why}".replace(str(place), "")
        return ""

    with ThreadPoolExecutor(2) as pool:
        return [why for why in pool.map(one, seeds) if why]


@pytest.mark.new("a drop where locks do nothing is refused")
@pytest.mark.parametrize("name", ["drop", "drop in place"])
def test_where_locks_do_nothing_a_drop_is_refused(place, name):
    round_ = a_round(place, name, "load")
    model = round_.seen[0]
    before = {path.name: sha256(path) for path in model.directory.glob("*.safetensors")}
    ended = model.drop(fault={"no_locks": True})
    assert ended.fired
    assert ended.code == 1, "it was not refused"
    assert "lock" in ended.err
    assert {p.name: sha256(p) for p in model.directory.glob("*.safetensors")} == before


@pytest.mark.new("a drop where locks do nothing is refused")
def test_where_locks_do_nothing_two_drops_remove_nothing(place):
    round_ = a_round(place, "drop", "drop into another cache")
    digests = [sha256(path) for path in round_.model.directory.glob("*.safetensors")]
    running = [model.start_drop(fault={"no_locks": True}) for model in round_.seen]
    ended = [one.wait() for one in running]
    assert all(one.fired for one in ended)
    assert [one.code for one in ended] == [1, 1]
    assert all(holds(round_.model.directory, digest) for digest in digests)


def test_where_locks_do_nothing_a_conversion_is_still_done(place):
    model = a_round(place, "drop", "load").model
    before = snapshot(model.directory)
    ended = model.convert(fault={"no_locks": True})
    assert ended.fired
    assert ended.code == 0
    assert snapshot(model.directory) == before
