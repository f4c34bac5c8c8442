"""One linear: its parts are checked in every layout, and become the same outputs."""

from __future__ import annotations

import pytest

from paroquant_stream.checkpoint.layout import Layout
from paroquant_stream.checkpoint.quantization import Quantization
from paroquant_stream.plan.linear import Linear
from paroquant_stream.plan.task import Part

K, N, G = 256, 64, 64
GROUPS, PADDED = K // G, 16


def bits_of(layout: Layout) -> int:
    return 5 if layout is Layout.INT5_BITPLANE else 4


def linear(layout: Layout, is_expert: bool = False, **changes) -> Linear:
    """A linear of K inputs and N outputs in a layout; `changes` gives dtype and shape, or None."""
    specs = {
        "qweight": ("I32", (K, N // 8)) if layout.is_awq else ("I16", (N // 4, K)),
        "scales": ("F16", (GROUPS, N)),
        "zeros": ("I32", (GROUPS, N // 8)) if layout.is_awq else ("F16", (GROUPS, N)),
    }
    if layout is Layout.PARO_NATIVE_LEGACY:
        specs |= {"scales": ("F16", (PADDED, N)), "zeros": ("F16", (PADDED, N))}
    if layout is Layout.INT5_BITPLANE:
        specs |= {"qweight_hi": ("I32", (K, N // 32)), "qzeros_hi": ("I32", (GROUPS, N // 32))}
    if not is_expert:
        specs |= {
            "theta": ("F16", (8, K // 2)),
            "pairs": ("I16", (8, K)),
            "channel_scales": ("F16", (1, K)),
        }
    made = Linear("m.q_proj", layout, Quantization(bits_of(layout), G), is_expert)
    for role, spec in (specs | changes).items():
        if spec:
            name = layout.spell("m.q_proj", role)
            made.parts[role] = Part(name, *spec, shard="a.safetensors", start=0, stop=1)
    return made


@pytest.mark.parametrize("layout", Layout)
def test_a_complete_linear_has_no_issue_and_three_outputs(layout):
    made = linear(layout, bias=("F16", (N,)))
    assert made.issues() == []
    outputs = {o.name: (o.dtype, o.shape) for op in made.operations() for o in op.outputs}
    assert outputs == {
        "m.q_proj.weight": ("U32", (N, K * bits_of(layout) // 32)),
        "m.q_proj.scales": ("F16", (N, GROUPS)),
        "m.q_proj.biases": ("F16", (N, GROUPS)),
        "m.q_proj.theta": ("F16", (8, K // 2)),
        "m.q_proj.pairs": ("I16", (8, K)),
        "m.q_proj.channel_scales": ("F16", (1, K)),
        "m.q_proj.bias": ("F16", (N,)),
    }


def test_operations_come_in_the_same_order_every_time():
    made = linear(Layout.AUTOAWQ, bias=("F16", (N,)))
    names = [operation.outputs[0].name for operation in made.operations()]
    assert names[3:] == [
        f"m.q_proj.{role}" for role in ("bias", "channel_scales", "pairs", "theta")
    ]


def test_channel_scales_of_one_dimension_become_a_row():
    made = linear(Layout.AUTOAWQ, channel_scales=("F16", (K,)))
    assert made.issues() == []
    shapes = {o.name: o.shape for op in made.operations() for o in op.outputs}
    assert shapes["m.q_proj.channel_scales"] == (1, K)


@pytest.mark.parametrize("rows", [GROUPS, PADDED])
def test_legacy_group_rows_may_be_padded(rows):
    made = linear(Layout.PARO_NATIVE_LEGACY, scales=("F16", (rows, N)), zeros=("F16", (rows, N)))
    assert made.issues() == []
    values = {op.kind: op.values for op in made.operations()}
    assert values["legacy_scales"] == values["legacy_biases"] == (("groups", GROUPS),)


@pytest.mark.parametrize(("group_size", "padded"), [(128, 8), (64, 16), (32, 32)])
def test_the_padding_of_legacy_group_rows_is_that_of_tinychat(group_size, padded):
    """One word of 8 rows for groups of 128, two for 64 and four for 32."""
    for rows, sound in ((padded, True), (padded // 2, False), (2 * padded, False)):
        grid = ("F16", (rows, N))
        parts = linear(Layout.PARO_NATIVE_LEGACY, scales=grid, zeros=grid).parts
        made = Linear(
            "m.q_proj", Layout.PARO_NATIVE_LEGACY, Quantization(4, group_size), False, parts
        )
        assert [issue.partition(" ")[0] for issue in made.issues()] == (
            [] if sound else [parts["scales"].name, parts["zeros"].name]
        )


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("role", ["scales", "zeros", "theta", "pairs", "channel_scales"])
def test_a_missing_part_is_named_as_the_layout_spells_it(layout, role):
    (issue,) = linear(layout, **{role: None}).issues()
    assert issue.startswith(f"{layout.spell('m.q_proj', role)}: missing")
    assert "a.safetensors" in issue


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("role", ["scales", "zeros", "theta", "pairs", "channel_scales", "bias"])
def test_a_wrong_shape_is_named_with_expected_and_found(layout, role):
    (issue,) = linear(layout, **{role: ("F16", (5, 7, 3))}).issues()
    assert issue.startswith(layout.spell("m.q_proj", role))
    assert "expected" in issue
    assert "found F16 (5, 7, 3)" in issue


@pytest.mark.parametrize("layout", Layout)
def test_inputs_that_do_not_divide_by_the_group_size_are_named(layout):
    shape = (K + 32, N // 8) if layout.is_awq else (N // 4, K + 32)
    dtype = "I32" if layout.is_awq else "I16"
    (issue,) = linear(layout, qweight=(dtype, shape)).issues()
    assert "288 inputs do not divide by group_size 64" in issue


def test_an_expert_needs_no_rotation_and_may_have_none():
    assert linear(Layout.AUTOAWQ, is_expert=True).issues() == []
    (issue,) = linear(Layout.AUTOAWQ, is_expert=True, theta=("F16", (8, K // 2))).issues()
    assert "experts share one" in issue


@pytest.mark.parametrize("shape", [(0, N // 8), (K, 0)])
def test_a_linear_without_inputs_or_outputs_is_an_issue(shape):
    (issue,) = linear(Layout.AUTOAWQ, qweight=("I32", shape)).issues()
    assert f"expected I32 two dimensions, found I32 {shape}" in issue


def test_legacy_inputs_come_in_blocks_of_64():
    made = linear(Layout.PARO_NATIVE_LEGACY, qweight=("I16", (N // 4, 96)))
    made = Linear("m", made.layout, Quantization(4, 32), False, made.parts)
    (issue,) = made.issues()
    assert "96 inputs; TinyChat packs multiples of 64" in issue
