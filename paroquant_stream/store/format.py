"""Pieces of stacked experts: a shard's run of consecutive experts is stored as
`<stack>.experts_<first>_<last>`, shape (last - first + 1, ...), until it is joined with the others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from ..errors import AssemblyError

_PIECE = re.compile(r"(?P<stack>.+)\.experts_(?P<first>\d+)_(?P<last>\d+)")


def stacks_in_pieces(names: Iterable[str]) -> dict[str, list[str]]:
    """Stack -> the names of its pieces in the order of the experts; other names are left out.

    Raises AssemblyError when experts between two pieces are in none.
    """
    found: dict[str, dict[int, tuple[int, str]]] = defaultdict(dict)
    for name in names:
        if match := _PIECE.fullmatch(name):
            found[match["stack"]][int(match["first"])] = (int(match["last"]), name)
    stacks = {}
    for stack, runs in found.items():
        expected = 0
        for first in sorted(runs):
            if first != expected:
                raise AssemblyError(f"{stack}: experts {expected} to {first - 1} are in no entry")
            expected = runs[first][0] + 1
        stacks[stack] = [runs[first][1] for first in sorted(runs)]
    return stacks
