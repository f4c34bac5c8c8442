"""Tests of layouts: detection, names, and unknown forms."""

from __future__ import annotations

import pytest

from paroquant_stream.checkpoint.layout import Layout, detect, shared_rotation
from paroquant_stream.errors import LayoutError

INT5 = {"quantization_config": {"bits": 5, "format": "int5-bitplane"}}


@pytest.mark.parametrize(
    ("dtypes", "config", "layout"),
    [
        ({"x.qweight": "I32"}, {}, Layout.AUTOAWQ),
        ({"x.qlinear.qweight": "I32"}, {}, Layout.AWQ_QLINEAR),
        ({"x.qweight": "I32"}, INT5, Layout.INT5_BITPLANE),
        ({"x.qlinear.qweight": "I16"}, {"quantization_config": {}}, Layout.PARO_NATIVE),
        ({"x.qlinear.qweight": "I16"}, {"paroquant_config": {}}, Layout.PARO_NATIVE_LEGACY),
    ],
)
def test_names_dtypes_and_config_decide_the_layout(dtypes, config, layout):
    assert detect(config, dtypes) is layout


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"x.weight": "F16"}, "nothing here is quantized"),
        ({"x.qweight": "F16"}, "fits no layout"),
        ({"x.qweight": "I32", "y.qlinear.qweight": "I16"}, "two layouts"),
    ],
)
def test_an_unknown_layout_is_refused(dtypes, message):
    with pytest.raises(LayoutError, match=message):
        detect({}, dtypes)


@pytest.mark.parametrize("layout", Layout)
def test_split_is_the_inverse_of_spell(layout):
    for suffix, role in layout.roles.items():
        name = layout.spell("model.layers.0.mlp.up_proj", role)
        assert name.endswith(suffix)
        assert layout.split(name) == ("model.layers.0.mlp.up_proj", role)


def test_a_name_of_no_quantized_tensor_is_not_split():
    assert Layout.AUTOAWQ.split("model.norm.weight") is None
    assert Layout.PARO_NATIVE.split("model.layers.0.mlp.up_proj.qweight") is None


def test_a_shared_rotation_is_named_as_in_the_model():
    name = "model.layers.3.mlp.experts.gate_up_weight_theta"
    assert shared_rotation(name) == "model.layers.3.mlp.switch_mlp.gate_up_rot_theta"
    assert shared_rotation("model.layers.3.mlp.experts.3.down_proj.scales") is None


def test_the_two_awq_layouts_pack_words_alike():
    assert [layout for layout in Layout if not layout.is_awq] == [
        Layout.PARO_NATIVE, Layout.PARO_NATIVE_LEGACY,
    ]  # fmt: skip


def test_both_configs_mean_the_current_native_layout():
    config = {"paroquant_config": {}, "quantization_config": {}}
    assert detect(config, {"x.qlinear.qweight": "I16"}) is Layout.PARO_NATIVE
