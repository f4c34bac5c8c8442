"""Layouts: told apart by names, dtypes and config, and refused when unknown."""

from __future__ import annotations

import pytest

from paroquant_stream.checkpoint.layout import Layout, detect, shared_rotation
from paroquant_stream.checkpoint.quantization import Quantization, read_quantization
from paroquant_stream.errors import LayoutError
from tests.helpers.builders import CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "4 bits"),
        ({"bits": True}, "4 bits"),
        ({"group_size": 100}, "group_size"),
        ({"quant_method": "awq"}, "paroquant"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    block = CONFIG["quantization_config"] | change
    with pytest.raises(LayoutError, match=message):
        read_quantization({"quantization_config": block})


def test_a_config_without_quantization_is_refused():
    with pytest.raises(LayoutError, match="not a ParoQuant model"):
        read_quantization({"model_type": "llama"})


def test_quantization_inside_text_config_is_found():
    assert read_quantization(
        {"text_config": {"paroquant_config": {"nbit": 4, "group_size": 64}}}
    ) == (Quantization(4, 64))


@pytest.mark.parametrize(
    ("dtypes", "config", "layout"),
    [
        ({"x.qweight": "I32"}, {}, Layout.AUTOAWQ),
        ({"x.qlinear.qweight": "I32"}, {}, Layout.AWQ_QLINEAR),
        ({"x.qlinear.qweight": "I16"}, {"quantization_config": {}}, Layout.PARO_NATIVE),
        ({"x.qlinear.qweight": "I16"}, {"paroquant_config": {}}, Layout.PARO_NATIVE_LEGACY),
    ],
)
def test_the_layout_is_told_by_names_dtypes_and_config(dtypes, config, layout):
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
def test_what_is_spelled_is_split_again(layout):
    for suffix, role in layout.roles.items():
        name = layout.spell("model.layers.0.mlp.up_proj", role)
        assert name.endswith(suffix)
        assert layout.split(name) == ("model.layers.0.mlp.up_proj", role)


def test_a_name_that_is_no_part_is_not_split():
    assert Layout.AUTOAWQ.split("model.norm.weight") is None
    assert Layout.PARO_NATIVE.split("model.layers.0.mlp.up_proj.qweight") is None


def test_a_shared_rotation_is_named_as_the_model_names_it():
    name = "model.layers.3.mlp.experts.gate_up_weight_theta"
    assert shared_rotation(name) == "model.layers.3.mlp.switch_mlp.gate_up_rot_theta"
    assert shared_rotation("model.layers.3.mlp.experts.3.down_proj.scales") is None
