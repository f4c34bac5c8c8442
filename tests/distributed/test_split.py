"""Which parts of a model can be requested."""

from __future__ import annotations

import pytest

from paroquant_stream import load
from paroquant_stream.distributed.split import WHOLE, Split
from tests.helpers.ranks import Rank


@pytest.mark.parametrize("wrong", [range(0), range(0, 2, 2), range(-1, 1), [0, 1], 3])
def test_an_invalid_range_is_refused_before_any_work(wrong, tmp_path):
    with pytest.raises(ValueError, match="layers"):
        load(tmp_path / "absent", layers=wrong)


def test_layers_start_at_zero():
    assert Split(range(1)).layers == range(1)
    with pytest.raises(ValueError, match="start at 0, not at -1"):
        Split(range(-1, 1))


def test_layers_and_a_group_exclude_each_other():
    with pytest.raises(ValueError, match="only one of the two"):
        Split(range(1), Rank(0, 1))


def test_an_unknown_way_to_split_is_refused():
    with pytest.raises(ValueError, match="one of pipeline, tensor, not 'data'"):
        Split(group=Rank(0, 2), parallel="data")


@pytest.mark.parametrize(
    ("split", "by_layers", "by_tensors"),
    [
        (WHOLE, False, False),
        (Split(range(1)), True, False),
        (Split(group=Rank(0, 2)), True, False),
        (Split(group=Rank(0, 2), parallel="tensor"), False, True),
        (Split(parallel="tensor"), False, False),
        (Split(range(1), parallel="tensor"), True, False),
    ],
    ids=["whole", "layers", "pipeline", "tensor", "tensor of no group", "layers, not tensors"],
)
def test_a_split_is_by_layers_or_by_tensors(split, by_layers, by_tensors):
    assert split.by_layers is by_layers
    assert split.by_tensors is by_tensors
