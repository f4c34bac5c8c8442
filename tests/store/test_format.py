"""Tests of the names of pieces of stacked experts."""

from __future__ import annotations

import pytest

from paroquant_stream.errors import AssemblyError
from paroquant_stream.store.format import stacks_in_pieces


def test_pieces_are_sorted_by_expert_not_by_name():
    names = ["x.experts_10_10", "y", "x.experts_2_9", "x.experts_0_1"]
    assert stacks_in_pieces(names) == {
        "x": ["x.experts_0_1", "x.experts_2_9", "x.experts_10_10"],
    }


@pytest.mark.parametrize(
    "names",
    [["x.experts_1_2"], ["x.experts_0_1", "x.experts_3_4"], ["x.experts_0_2", "x.experts_1_3"]],
)
def test_a_gap_or_an_overlap_of_pieces_is_an_error(names):
    with pytest.raises(AssemblyError, match="are in no entry"):
        stacks_in_pieces(names)
