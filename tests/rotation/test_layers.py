"""The rotated linear layer: its parameters, its tables, and its output against float64."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from paroquant_stream.rotation.layers import (
    RotateQuantizedLinear,
    build_tables,
    table_bytes,
    table_seconds,
)
from tests.helpers.rotated_layers import (
    GROUP,
    KROT,
    Rotation,
    dense,
    fill,
    make_linear,
    names_and_shapes,
    parameters_of,
)
from tests.helpers.rotations import error, make_x, rotate_float64, to_float64


def test_a_linear_has_exactly_the_stored_parameters():
    layer = RotateQuantizedLinear(256, 96, group_size=64, bits=4, krot=3)
    assert names_and_shapes(layer) == {
        "theta": (3, 128),
        "pairs": (3, 256),
        "channel_scales": (1, 256),
        "weight": (96, 32),
        "scales": (96, 4),
        "biases": (96, 4),
    }
    assert (layer.pairs.dtype, layer.weight.dtype) == (mx.int16, mx.uint32)
    with_bias = RotateQuantizedLinear(256, 96, bias=True, group_size=64, bits=8, krot=3)
    assert names_and_shapes(with_bias) == names_and_shapes(layer) | {
        "bias": (96,),
        "weight": (96, 64),
    }
    assert names_and_shapes(Rotation(256, group_size=64, krot=3)) == {
        name: names_and_shapes(layer)[name] for name in ("theta", "pairs", "channel_scales")
    }


def test_a_rotated_layer_is_no_plain_quantized_layer():
    """`nn.quantize` looks for to_quantized; mlx-vlm reads the weight of a QuantizedLinear."""
    for layer in (Rotation(64, group_size=64), make_linear()):
        assert not hasattr(layer, "to_quantized")
        assert not isinstance(layer, (nn.Linear, nn.QuantizedLinear))


def test_making_layers_allocates_next_to_nothing():
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    layers = [RotateQuantizedLinear(28672, 8192, bias=True) for _ in range(20)]
    assert len(layers) == 20
    assert mx.get_peak_memory() - before < 1 << 20


def test_a_new_rotation_changes_nothing():
    x = make_x((3, 256), mx.float16)
    assert mx.array_equal(Rotation(256, group_size=64)(x), x)


def test_dims_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="100 channels do not divide into groups of 64"):
        RotateQuantizedLinear(100, 8, group_size=64)
    with pytest.raises(ValueError, match="96 channels do not divide into groups of 3"):
        RotateQuantizedLinear(96, 8, group_size=3)


def test_a_rotation_alone_computes_the_definition():
    layer = fill(Rotation(192, group_size=GROUP, krot=KROT))
    x = make_x((5, 192))
    expected = rotate_float64(to_float64(x), *parameters_of(layer), GROUP)
    assert error(layer(x), expected) < 1e-6


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 192), (2, 40, 192)])
def test_a_linear_equals_its_weight_with_the_rotation_folded_in(shape, has_bias):
    layer = make_linear(bias=has_bias)
    # rotate(x) = x @ folding, so y = x @ (W @ folding.T).T, one dense matrix
    folding = rotate_float64(np.eye(192), *parameters_of(layer), GROUP)
    folded = dense(layer) @ folding.T
    x = make_x(shape)
    expected = to_float64(x) @ folded.T + (to_float64(layer.bias) if has_bias else 0.0)
    layer.scales, layer.biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    assert error(layer(x), expected) < 2e-6


@pytest.mark.parametrize(
    ("x_dtype", "scales_dtype", "expected"),
    [
        (mx.float16, mx.float16, mx.float16),
        (mx.bfloat16, mx.float16, mx.float32),  # as the paroquant package's layer
        (mx.bfloat16, mx.bfloat16, mx.bfloat16),
        (mx.float32, mx.float16, mx.float32),
    ],
)
def test_the_output_dtype_is_the_promotion_of_x_and_scales(x_dtype, scales_dtype, expected):
    layer = make_linear()
    for name in ("scales", "biases"):
        layer[name] = layer[name].astype(scales_dtype)
    y = layer(make_x((2, 192), x_dtype))
    assert y.dtype == expected
    reference = to_float64(layer(make_x((2, 192), x_dtype).astype(mx.float32)))
    assert error(y, reference) < (4e-2 if expected == mx.bfloat16 else 5e-3)


@pytest.mark.usefixtures("on_the_cpu")  # counts the bytes of the reference's tables
def test_tables_are_no_parameters_and_are_reported():
    model = nn.Sequential(make_linear(192, 192), make_linear(192, 64))
    before = names_and_shapes(model)
    assert (table_bytes(model), table_seconds(model)) == (0, 0)
    mx.eval(model(make_x((1, 192), mx.float16)))
    assert names_and_shapes(model) == before
    assert names_and_shapes(model.layers[0]).keys() == {
        *("theta", "pairs", "channel_scales", "weight", "scales", "biases")
    }
    assert table_bytes(model) == 2 * 192 * (KROT * 10 + 4)
    assert table_seconds(model) > 0


@pytest.mark.usefixtures("on_the_cpu")  # counts the bytes of the reference's tables
def test_tables_can_be_built_before_the_first_call():
    model = nn.Sequential(make_linear(192, 192), make_linear(192, 64))
    build_tables(model)
    built = table_bytes(model), table_seconds(model)
    assert built[0] == 2 * 192 * (KROT * 10 + 4)
    mx.eval(model(make_x((1, 192), mx.float16)))
    assert built == (table_bytes(model), table_seconds(model))


@pytest.mark.usefixtures("on_the_cpu")  # counts the bytes of the reference's tables
def test_a_layer_that_two_places_share_counts_once():
    layer = make_linear(192, 192)
    model = nn.Sequential(layer, layer)
    build_tables(model)
    assert table_bytes(model) == 192 * (KROT * 10 + 4)


@pytest.mark.parametrize("name", ["theta", "pairs", "channel_scales"])
def test_tables_are_rebuilt_when_a_parameter_is_replaced(name):
    layer, x = fill(Rotation(192, group_size=GROUP, krot=KROT)), make_x((3, 192))
    first = layer(x)
    other = fill(Rotation(192, group_size=GROUP, krot=KROT), seed=1)
    layer.update({name: other[name]})
    expected = rotate_float64(to_float64(x), *parameters_of(layer), GROUP)
    assert error(layer(x), expected) < 1e-6
    assert error(first, expected) > 0.1


def test_weights_loaded_after_a_first_call_take_effect():
    layer, x = Rotation(192, group_size=GROUP, krot=KROT), make_x((3, 192))
    mx.eval(layer(x))
    fill(layer)
    expected = rotate_float64(to_float64(x), *parameters_of(layer), GROUP)
    assert error(layer(x), expected) < 1e-6


def test_a_copy_has_tables_of_its_own():
    layer, x = fill(Rotation(192, group_size=GROUP, krot=KROT)), make_x((3, 192))
    y = layer(x)
    twin = copy.deepcopy(layer)
    fill(twin, seed=1)
    assert mx.array_equal(layer(x), y)
    assert not mx.array_equal(twin(x), y)


def test_threads_that_call_first_at_once_get_the_same_result():
    layer, x = make_linear(), make_x((4, 192), mx.float16)
    expected = np.array(make_linear()(x))
    mx.eval(layer.parameters(), x)
    together, results = threading.Barrier(8), []

    def call():
        together.wait()
        results.append(np.array(layer(x)))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(np.array_equal(result, expected) for result in results)


def test_tables_built_in_a_thread_outlive_it():
    """MLX ties lazy arrays to the thread that made them; tables are evaluated."""
    layer, x = make_linear(), make_x((4, 192), mx.float16)
    mx.eval(layer.parameters())
    thread = threading.Thread(target=build_tables, args=(layer,))
    thread.start()
    thread.join()
    assert table_bytes(layer) > 0
    assert mx.array_equal(layer(x), make_linear()(x))


def test_importing_the_layers_imports_no_model_library():
    """These imports take seconds, which a run may not need."""
    code = (
        "import sys, paroquant_stream.rotation.layers;"
        "sys.exit(bool({'mlx_lm', 'mlx_vlm', 'paroquant'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_parameter_is_trainable():
    """Gradients are not defined for quantized weights."""
    assert make_linear(bias=True).trainable_parameters() == {}
    assert make_linear(bias=True).parameters()


def test_the_bias_is_added_once_to_the_sum_over_ranks(monkeypatch):
    layer, x, group = make_linear(bias=True), make_x((2, 192), mx.float32), object()
    alone = layer(x)

    def all_sum(y, group):
        summed.append(group)
        return 2 * y

    summed = []
    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    layer.ranks = group
    assert mx.allclose(layer(x), 2 * alone - layer.bias, rtol=1e-3, atol=1e-3)
    assert summed == [group]
