"""A picture of which shards lend tensors to which: an entry is made of its shard and of tensors
that lie in others.

    model-00001-of-00003.safetensors                      1, 3-64, 70
    `-- model-00003-of-00003.safetensors  2 tensors       `-- the one after it  2 tensors each

On the left every shard has its own place; on the right, of a model of many shards, those that
borrow alike share one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..text import bytes_text, counted, without_start
from .task import Task

SINGLE = 12  # shards of a model of which each has its own place
_LINES = 4  # runs of lenders that have a line each; more share one
_GROUPS = 24  # after which only the number of the rest is shown
_NOTHING = "needs no other"
_KINDS = ("all", "at", "by")  # the plainest first
_Loans = Mapping[int, tuple[int, int]]
"""What one shard borrows: tensors and bytes by the lender's position."""
_Pattern = tuple[str, tuple[int, ...]]
"""A way to say from whom: `all`; `at` positions; `by` distances from the borrower."""


@dataclass
class _Group:
    """Shards that borrow alike, by position."""

    members: list[int]
    patterns: set[_Pattern]
    """All that hold for every member."""


def lending_lines(tasks: Sequence[Task], width: int) -> list[str]:
    """Return the lines of the picture, in ASCII.

    Args:
        tasks: All of a plan, in its order.
        width: The most columns of a line; less than 40 count as 40.
    """
    width = max(width, 40)
    names = [task.shard for task in tasks]
    loans = _loans(tasks)
    borrowers = sum(map(bool, loans.values())) or "none"
    lines = [f"{counted(len(tasks), 'shard')}, {borrowers} made with tensors of others"]
    if len(tasks) <= SINGLE:
        for place, found in loans.items():
            single = [(names[lender - 1], _sum([loan])) for lender, loan in found.items()]
            lines += _place(names[place - 1], single, width)
        return lines
    digits = len(str(len(names)))
    for place in (1, len(names)):
        lines.append(
            f"  {place:<{digits}} is {without_start(names[place - 1], width - digits - 6)}"
        )
    groups = _groups(loans)
    if len(groups) > _GROUPS:
        groups.sort(key=lambda group: -len(group.members))
    for group in groups[:_GROUPS]:
        lines += ["", *_place(_runs(group.members), _lenders(group, loans), width)]
    if left := sum(len(group.members) for group in groups[_GROUPS:]):
        lines += ["", f"... and {counted(left, 'shard')} more: --json lists all"]
    return lines


def lending_json(tasks: Sequence[Task]) -> list[dict[str, object]]:
    """Return what each shard borrows from which, with the names of the tensors."""
    return [
        {
            "shard": task.shard,
            "borrows": [
                {
                    "shard": lender,
                    "tensors": [part.name for part in parts],
                    "bytes": sum(part.stop - part.start for part in parts),
                }
                for lender, parts in task.borrowed.items()
            ],
        }
        for task in tasks
    ]


def _loans(tasks: Sequence[Task]) -> dict[int, _Loans]:
    """Return what each shard borrows, all by position from 1."""
    places = {task.shard: place for place, task in enumerate(tasks, 1)}
    return {
        places[task.shard]: {
            places[lender]: (len(parts), sum(part.stop - part.start for part in parts))
            for lender, parts in sorted(task.borrowed.items(), key=lambda item: places[item[0]])
        }
        for task in tasks
    }


def _groups(loans: Mapping[int, _Loans]) -> list[_Group]:
    """Put shards together for which one way to say from whom they borrow holds."""
    groups: list[_Group] = []
    for place, found in loans.items():
        patterns: set[_Pattern] = {
            ("at", tuple(found)),
            ("by", tuple(lender - place for lender in found)),
        }
        if found and len(found) == len(loans) - 1:
            patterns.add(("all", ()))
        for group in groups:
            if common := group.patterns & patterns:
                group.members.append(place)
                group.patterns = common
                break
        else:
            groups.append(_Group([place], patterns))
    return groups


def _lenders(group: _Group, loans: Mapping[int, _Loans]) -> list[tuple[str, str]]:
    """Return the lenders of a group, in runs, each with what it lends to one or to all members."""
    kind, numbers = min(group.patterns, key=lambda pattern: _KINDS.index(pattern[0]))
    if kind == "all":
        return [("all others", _sum([_total(loans[place]) for place in group.members]))]
    runs = _split(numbers)
    if len(runs) > _LINES:
        runs = [numbers]
    start = {place: place if kind == "by" else 0 for place in group.members}
    lenders = []
    for run in runs:
        parts = [
            _total({n: loan for n, loan in loans[place].items() if n - start[place] in run})
            for place in group.members
        ]
        lenders.append((_runs(run) if kind == "at" else _distances(run), _sum(parts)))
    return lenders


def _total(loans: _Loans) -> tuple[int, int]:
    return sum(tensors for tensors, _ in loans.values()), sum(size for _, size in loans.values())


def _sum(found: Sequence[tuple[int, int]]) -> str:
    """Return the tensors and bytes that each of some shards borrows, in one phrase."""
    counts = sorted({tensors for tensors, _ in found})
    size = bytes_text(sum(nbytes for _, nbytes in found))
    if len(found) == 1:
        return f"{counted(counts[0], 'tensor')}, {size}"
    each = counted(counts[0], "tensor") if len(counts) == 1 else f"{counts[0]}-{counts[-1]} tensors"
    return f"{each} each, {size} in all"


def _place(name: str, lenders: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Return the lines of a shard, or of several, and a branch for each lender."""
    if lenders:
        return [*_fitted(name, width), *_branches(lenders, width)]
    rows = _fitted(name, width - len(_NOTHING) - 2)
    return [*rows[:-1], f"{rows[-1]}  {_NOTHING}"]


def _branches(lenders: Sequence[tuple[str, str]], width: int) -> list[str]:
    left = width - 4 - max(len(note) + 2 for _, note in lenders)
    longest = min(max(len(label) for label, _ in lenders), left)
    lines = []
    for index, (label, note) in enumerate(lenders, 1):
        rows = _fitted(label, longest)
        first, rest = ("`-- ", "    ") if index == len(lenders) else ("|-- ", "|   ")
        lines.append(f"{first}{rows[0]:{longest}}  {note}".rstrip())
        lines += [f"{rest}{row}" for row in rows[1:]]
    return lines


def _split(numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Cut rising numbers into runs of consecutive ones."""
    parts = groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    return [tuple(number for _, number in part) for _, part in parts]


def _runs(numbers: Sequence[int]) -> str:
    """Return numbers like `1, 3-64, 70`."""
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in _split(numbers))


def _distances(numbers: Sequence[int]) -> str:
    """Return distances like `the one after it`, or `1-3, 7 before it`."""
    before, after = [-n for n in reversed(numbers) if n < 0], [n for n in numbers if n > 0]
    phrases = [
        f"the one {where} it" if found == [1] else f"{_runs(found)} {where} it"
        for found, where in ((before, "before"), (after, "after"))
        if found
    ]
    return " and ".join(phrases)


def _fitted(text: str, width: int) -> list[str]:
    """Wrap a list of numbers; a file name is cut at its start, as its end identifies it."""
    return textwrap.wrap(text, width) if " " in text else [without_start(text, width)]
