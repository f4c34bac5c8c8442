"""Tensors and parameters that do not match are errors, all of them in one message."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from paroquant_stream import load
from paroquant_stream.errors import AssemblyError
from paroquant_stream.model.placement import place_weights
from tests.helpers.builders import HIDDEN, write_llama


def test_a_missing_an_extra_and_a_misshapen_tensor_are_one_error(tmp_path):
    norm = np.ones(HIDDEN + 32, np.float16)
    directory = write_llama(
        tmp_path,
        drop=["model.norm.weight"],
        **{"model.layers.0.input_layernorm.weight": norm, "model.extra.weight": norm},
    )
    with pytest.raises(AssemblyError) as caught:
        load(directory)
    message = str(caught.value)
    assert "3 differences" in message
    assert "model.norm.weight: no stored tensor" in message
    assert "model.extra.weight: no such parameter" in message
    assert "model.layers.0.input_layernorm.weight: the model has" in message


def test_an_integer_in_place_of_a_float_is_an_error(tmp_path):
    directory = write_llama(tmp_path, **{"model.norm.weight": np.ones(HIDDEN, np.int32)})
    with pytest.raises(AssemblyError, match=r"model\.norm\.weight"):
        load(directory)


def test_a_bias_without_a_parameter_is_an_error(tmp_path):
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float16)}
    with pytest.raises(AssemblyError, match=r"q_proj\.bias: no such parameter"):
        load(write_llama(tmp_path, **bias))


def test_a_bias_with_a_parameter_is_loaded(tmp_path):
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    sizes = dict(zip(names, (64, 32, 32, 64), strict=True))
    biases = {
        f"model.layers.{layer}.self_attn.{name}.bias": np.full(size, 0.5, np.float16)
        for layer in (0, 1)
        for name, size in sizes.items()
    }
    found, _, _ = load(write_llama(tmp_path, {"attention_bias": True}, **biases))
    assert found.model.layers[0].self_attn.q_proj.bias.tolist() == [0.5] * 64


def test_a_config_with_fewer_layers_is_an_error(tmp_path):
    with pytest.raises(AssemblyError, match=r"layers\.1\..*no such parameter"):
        load(write_llama(tmp_path, {"num_hidden_layers": 1}))


def test_fifty_differences_are_listed_and_the_others_counted(tmp_path):
    weights = {f"x{number:02}": mx.zeros(1) for number in range(52)}
    with pytest.raises(AssemblyError, match="52 differences between") as caught:
        place_weights(nn.Module(), weights, 4, 32, tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 52
    assert lines[-1] == "  ... and 2 more"


def test_weights_that_fit_no_layer_are_an_error_with_the_path(tmp_path):
    model = nn.Module()
    model.proj = nn.Linear(100, 8)
    weights = {"proj.theta": mx.zeros((8, 50))}
    with pytest.raises(AssemblyError, match=f"{tmp_path}: .*100 channels do not divide"):
        place_weights(model, weights, 4, 64, tmp_path)


def test_only_layers_with_scales_are_quantized(tmp_path):
    model = nn.Module()
    model.a, model.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    codes, scales, biases = mx.quantize(mx.ones((64, 64)), 64, 4)
    weights = {"a.weight": codes, "a.scales": scales, "a.biases": biases}
    place_weights(model, weights | {"b.weight": mx.ones((64, 64))}, 4, 64, tmp_path)
    assert isinstance(model.a, nn.QuantizedLinear)
    assert type(model.b) is nn.Linear
    assert mx.allclose(model.a(mx.ones((1, 64))), model.b(mx.ones((1, 64))))
    assert not model.training


def test_integers_of_another_width_are_an_error(tmp_path):
    model = nn.Module()
    model.index = mx.zeros(3, mx.int32)
    place_weights(model, {"index": mx.ones(3, mx.int32)}, 4, 64, tmp_path)
    with pytest.raises(AssemblyError, match=r"index: the model has .*int32 .*stored is .*int16"):
        place_weights(model, {"index": mx.ones(3, mx.int16)}, 4, 64, tmp_path)


def test_floats_of_another_width_are_taken_as_they_are_stored(tmp_path):
    model = nn.Module()
    model.scale = mx.zeros(3, mx.float32)
    place_weights(model, {"scale": mx.ones(3, mx.bfloat16)}, 4, 64, tmp_path)
    assert model.scale.dtype == mx.bfloat16
