"""Stacks of experts, joined from pieces and from single experts."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from paroquant_stream.errors import AssemblyError
from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.model.experts import join_pieces, placeholders, stack_experts


def test_pieces_are_joined_in_the_order_of_the_experts():
    def piece(*experts: int) -> mx.array:
        return mx.array(np.array([[e] for e in experts], np.uint32))

    joined = join_pieces(
        {
            "x.experts_10_10": piece(10),
            "x.experts_0_1": piece(0, 1),
            "x.experts_2_9": piece(*range(2, 10)),
        },
        lazy=False,
    )
    assert list(joined) == ["x"]
    assert joined["x"].flatten().tolist() == list(range(11))


def test_a_missing_run_of_experts_is_named():
    with pytest.raises(AssemblyError, match="x: experts 0 to 1 are in no entry"):
        join_pieces({"x.experts_2_3": mx.zeros((2, 1))}, lazy=False)


def test_unquantized_experts_are_stacked():
    weights = {f"l.experts.{e}.up_proj.weight": mx.full((2, 2), e) for e in range(12)}
    stacked = stack_experts(weights)
    assert stacked["l.switch_mlp.up_proj.weight"].shape == (12, 2, 2)
    assert stacked["l.switch_mlp.up_proj.weight"][10, 0, 0].item() == 10


@pytest.mark.parametrize("numbers", [(0, 2), (1, 2)])
def test_missing_single_experts_are_an_error(numbers):
    weights = {f"l.experts.{number}.up_proj.weight": mx.zeros(1) for number in numbers}
    with pytest.raises(AssemblyError, match="experts are missing between 0 and 2"):
        stack_experts(weights)


def test_placeholders_have_the_shape_and_dtype_of_joined_stacks():
    specs = [
        TensorSpec("l.switch_mlp.up_proj.scales.experts_0_1", "F16", (2, 3)),
        TensorSpec("l.switch_mlp.up_proj.scales.experts_2_6", "F16", (5, 3)),
        TensorSpec("l.experts.0.down_proj.weight", "BF16", (4, 2)),
    ]
    assert {name: (array.shape, array.dtype) for name, array in placeholders(specs).items()} == {
        "l.switch_mlp.up_proj.scales": ((7, 3), mx.float16),
        "l.switch_mlp.down_proj.weight": ((1, 4, 2), mx.bfloat16),
    }


@pytest.mark.parametrize("lazy", [False, True])
def test_a_joined_stack_is_evaluated_unless_lazy(monkeypatch, lazy):
    evaluated = []
    monkeypatch.setattr(mx, "eval", evaluated.append)
    joined = join_pieces({"x.experts_0_1": mx.ones((2, 1)), "y": mx.ones(1)}, lazy=lazy)
    assert set(joined) == {"x", "y"}
    assert evaluated == ([] if lazy else [joined["x"]])
