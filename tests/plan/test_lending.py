"""The picture of which shards lend tensors to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.plan.lending import SINGLE, lending_json, lending_lines
from paroquant_stream.plan.task import Operation, Part, Task
from tests.helpers.builders import cut_apart, cut_evenly, llama_tensors
from tests.helpers.plans import plan_of


def name(place: int, count: int) -> str:
    return f"model-{place:05}-of-{count:05}.safetensors"


def tasks_of(count: int, lenders: Mapping[int, Sequence[int]]) -> list[Task]:
    """Tasks of so many shards; each borrows a tensor of 10 bytes from each of its lenders."""
    tasks = []
    for place in range(1, count + 1):
        shards = [name(other, count) for other in (place, *lenders.get(place, ()))]
        parts = tuple(Part(f"{place} of {s}", "U8", (10,), s, 0, 10) for s in shards)
        operation = Operation("copy", (parts,), (TensorSpec(str(place), "U8", (10,)),))
        tasks.append(Task(shards[0], 10, (operation,)))
    return tasks


def test_few_shards_have_a_place_each():
    assert lending_lines(tasks_of(3, {1: [2, 3], 3: [1]}), 80) == [
        "3 shards, 2 made with tensors of others",
        "model-00001-of-00003.safetensors",
        "|-- model-00002-of-00003.safetensors  1 tensor, 10 B",
        "`-- model-00003-of-00003.safetensors  1 tensor, 10 B",
        "model-00002-of-00003.safetensors  needs no other",
        "model-00003-of-00003.safetensors",
        "`-- model-00001-of-00003.safetensors  1 tensor, 10 B",
    ]


def test_one_shard_needs_no_other():
    assert lending_lines(tasks_of(1, {}), 80) == [
        "1 shard, none made with tensors of others",
        "model-00001-of-00001.safetensors  needs no other",
    ]


@pytest.mark.parametrize(
    ("lenders", "picture"),
    [
        ({i: [i + 1] for i in range(10, 60)}, "10-59 / `-- the one after it  1 tensor each, 500 B"),
        ({i: [i - 1] for i in (3, 5, 6)}, "3, 5-6 / `-- the one before it  1 tensor each, 30 B"),
        ({i: [191] for i in (3, 5, 6)}, "3, 5-6 / `-- 191  1 tensor each, 30 B in all"),
        ({7: [1, 2, 3, 9]}, "7 / |-- 1-3  3 tensors, 30 B / `-- 9    1 tensor, 10 B"),
        ({7: [1, 3, 5, 9, 11]}, "7 / `-- 1, 3, 5, 9, 11  5 tensors, 50 B"),
        (
            {i: [i - 2, i - 1, i + 1] for i in (7, 40)},
            "7, 40 / |-- 1-2 before it     2 tensors each, 40 B in all / "
            "`-- the one after it  1 tensor each, 20 B in all",
        ),
        (
            {i: [j for j in range(1, 192) if j != i] for i in (1, 2)},
            "1-2 / `-- all others  190 tensors each, 3.8 kB in all",
        ),
    ],
)
def test_of_many_shards_those_that_borrow_alike_share_a_place(lenders, picture):
    lines = lending_lines(tasks_of(191, lenders), 80)
    assert lines[1:3] == [f"  1   is {name(1, 191)}", f"  191 is {name(191, 191)}"]
    assert picture in " / ".join(lines)
    assert len(lines) < 20
    assert sum(line.endswith("needs no other") for line in lines) == 1


def test_what_each_lends_is_counted_over_the_members():
    tasks = tasks_of(SINGLE + 1, {3: [4], 5: [6]})
    (operation,) = tasks[2].operations
    more = Part("more", "U8", (30,), name(4, SINGLE + 1), 10, 40)
    tasks[2] = Task(tasks[2].shard, 10, (Operation("copy", ((*operation.slices[0], more),), ()),))
    assert lending_lines(tasks, 80)[-1] == "`-- the one after it  1-2 tensors each, 50 B in all"


def test_every_shard_is_in_one_place():
    lines = lending_lines(plan_of(llama_tensors(layers=20), cut_evenly(60)).tasks, 80)
    text = " ".join(lines[3:]).replace(",", " ").replace("needs no other", "|")
    members: list[int] = []
    for word in text.split("`--")[0].replace("|", " ").split():
        first, _, last = word.partition("-")
        members += range(int(first), int(last or first) + 1)
    count = int(lines[0].split()[0])
    assert sorted(members) == list(range(1, count + 1))


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize(
    "lenders",
    [
        {},
        {i: [i + 1] for i in range(1, 190, 2)},
        {i: [j for j in range(1, 192) if j % 3 == 0 and j != i] for i in (1, 2)},
        {i: [(i * i) % 191 + 1, (i * 7) % 191 + 1] for i in range(2, 40)},
    ],
)
def test_every_line_is_ascii_and_fits(lenders, width):
    for count in (3, 191):
        wanted = {i: [j for j in found if j <= count] for i, found in lenders.items()}
        lines = lending_lines(tasks_of(count, wanted), width)
        assert max(map(len, lines)) <= max(width, 50)
        assert "\n".join(lines).isascii()
        assert len(lines) < 200


def test_after_24_kinds_of_borrowing_only_the_number_of_the_rest_is_shown():
    lines = lending_lines(tasks_of(191, {i: [2 * i + 1] for i in range(1, 60)}), 80)
    assert lines[-1] == "... and 36 shards more: --json lists all"


def test_json_names_the_tensors():
    first, second = lending_json(tasks_of(2, {1: [2]}))
    assert second == {"shard": name(2, 2), "borrows": []}
    assert first == {
        "shard": name(1, 2),
        "borrows": [
            {"shard": name(2, 2), "tensors": [f"1 of {name(2, 2)}"], "bytes": 10},
        ],
    }


def test_the_loans_are_those_of_the_plan():
    tasks = plan_of(llama_tensors(), cut_apart(3)).tasks
    for task, found in zip(tasks, lending_json(tasks), strict=True):
        lent = {loan["shard"]: loan["tensors"] for loan in found["borrows"]}
        assert lent == {shard: [p.name for p in ps] for shard, ps in task.borrowed.items()}
    assert sum("`-- " in line for line in lending_lines(tasks, 80)) == 3
