"""Two commands at once: one of them completes the model, and none removes what the other needs."""

from __future__ import annotations

import functools
import random

import pytest

from tests.robustness.harness import holds, scratch, sha256, snapshot
from tests.robustness.pairs import COMMANDS, PAIRS, Round, first_removal

REMOVALS = ("rm", "prune --orphans", "prune --max-size 1B")
CHAIN = "a chain"


@functools.cache
def number_after_the_first_removal(name: str, converted: bool) -> int:
    with scratch() as place:
        return first_removal(CHAIN, place, COMMANDS[name], converted)


def a_round(place, first: str, second: str, cut: str = CHAIN) -> Round:
    return Round(place, COMMANDS[first], COMMANDS[second], cut, converted=second in REMOVALS)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_while_a_drop_has_removed_one_shard_the_other_command_harms_nothing(place, first, second):
    round_ = a_round(place, first, second)
    at = number_after_the_first_removal(first, round_.converted)
    assert round_.one_stopped(0, at), "the drop never got there"
    assert not (why := round_.problem()), why


@pytest.mark.parametrize("at", [3, 9, 15])
@pytest.mark.parametrize("second", REMOVALS)
def test_a_removal_that_began_before_a_drop_removes_nothing_that_the_drop_needs(place, second, at):
    """Stopped anywhere between its first look and its last call, while a drop begins and ends."""
    round_ = a_round(place, "drop", second)
    if not round_.one_stopped(1, at):
        pytest.skip(f"a {second} makes fewer than {at} calls")
    assert not (why := round_.problem()), why


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_in_two_hundred_rounds_two_commands_leave_a_model_that_is_completed(first, second):
    fired, wrong = 0, []
    for seed in range(200):
        source = random.Random(seed)
        cut = source.choice([CHAIN, "a cycle", "by size", "by size into 7", "between linears"])
        with scratch() as place:
            round_ = a_round(place, first, second, cut)
            if seed % 2:
                round_.in_turns(seed)
                fired += 1
            else:
                stopped = source.choice([0, 1])
                fired += round_.one_stopped(stopped, source.randrange(1, 120 if stopped else 200))
            if why := round_.problem():
                wrong.append(f"round {seed}, {cut}: {why}".replace(str(place), ""))
    assert fired > 100
    assert not wrong, f"{len(wrong)} of 200 rounds:\n" + "\n".join(wrong[:20])


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
