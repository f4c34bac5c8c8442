"""Tests of the quantization settings in a config."""

from __future__ import annotations

import pytest

from paroquant_stream.checkpoint.quantization import Quantization, read_quantization
from paroquant_stream.errors import LayoutError
from tests.helpers.builders import CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "4 bits"),
        ({"bits": True}, "4 bits"),
        ({"bits": 4.0}, "4 bits"),
        ({"bits": 5}, "found 5 in the format paroquant"),
        ({"bits": 5, "format": "paroquant"}, "found 5 in the format paroquant"),
        ({"format": "int5-bitplane"}, "found 4 in the format int5-bitplane"),
        ({"group_size": -1}, "group_size -1 .all inputs of a layer in one group."),
        ({"group_size": 100}, "group_size"),
        ({"quant_method": "awq"}, "paroquant"),
    ],
)
def test_an_unsupported_value_is_refused(change, message):
    block = CONFIG["quantization_config"] | change
    with pytest.raises(LayoutError, match=message):
        read_quantization({"quantization_config": block})


def test_a_config_without_quantization_is_refused():
    with pytest.raises(LayoutError, match="not a ParoQuant model"):
        read_quantization({"model_type": "llama"})


def test_quantization_in_text_config_is_found():
    assert read_quantization(
        {"text_config": {"paroquant_config": {"nbit": 4, "group_size": 64}}}
    ) == (Quantization(4, 64))


def test_absent_values_have_the_defaults_of_paroquant():
    assert read_quantization({"quantization_config": {}}) == Quantization(4, 128)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_sizes_of_mlx_are_accepted(group_size):
    config = {"quantization_config": {"group_size": group_size, "quant_method": "ParoQuant"}}
    assert read_quantization(config) == Quantization(4, group_size)


@pytest.mark.parametrize("value", [True, 16, 256, "128", 128.0])
def test_other_group_sizes_are_refused(value):
    with pytest.raises(LayoutError, match="expected a group_size of 32, 64 or 128"):
        read_quantization({"quantization_config": {"group_size": value}})


def test_five_bits_have_a_format_of_their_own():
    block = {"quant_method": "paroquant", "bits": 5, "format": "int5-bitplane", "group_size": 128}
    assert read_quantization({"quantization_config": block}) == Quantization(5, 128)


def test_a_config_of_gptqmodel_is_accepted():
    block = {
        "quant_method": "paroquant", "format": "paroquant", "bits": 4, "group_size": 128, "krot": 8,
        "sym": True, "desc_act": False, "lm_head": False, "meta": {"quantizer": ["gptqmodel:7"]},
    }  # fmt: skip
    assert read_quantization({"quantization_config": block}) == Quantization(4, 128)


def test_the_first_block_counts():
    config = {
        "paroquant_config": {"group_size": 32},
        "quantization_config": "not a block",
        "text_config": {"quantization_config": {"group_size": 64}},
    }
    assert read_quantization(config).group_size == 64
