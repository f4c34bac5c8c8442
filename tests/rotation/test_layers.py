"""The rotated layers: their parameters, their tables, and their output against float64."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from paroquant_stream.rotation import layers as rotation
from paroquant_stream.rotation.layers import RotateQuantizedLinear, RotateSwitchGLU
from tests.helpers.rotations import (
    Rotation,
    error,
    make_rotation,
    make_x,
    rotate_float64,
    to_float64,
)

GROUP, KROT = 64, 4


def names_and_shapes(module):
    return {name: tuple(array.shape) for name, array in tree_flatten(module.parameters())}


def fill(module, seed=0, dtype=mx.float16):
    """Random rotations and quantized weights in every place that the module has for them."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, array in tree_flatten(module.parameters()):
        prefix = name.removesuffix("theta")
        if prefix != name:
            krot, half = array.shape
            values = make_rotation(2 * half, module.group_size, krot, seed=random.integers(1 << 30))
            for leaf, value in zip(("theta", "pairs", "channel_scales"), values, strict=True):
                weights[prefix + leaf] = mx.array(value)
        elif name.endswith("weight"):
            *lead, words = array.shape
            dense = random.standard_normal((*lead, words * 8)) / np.sqrt(words * 8)
            codes, scales, biases = mx.quantize(
                mx.array(dense, dtype=mx.float32).astype(dtype), module.group_size, 4
            )
            path = name.removesuffix("weight")
            weights |= {name: codes, path + "scales": scales, path + "biases": biases}
        elif name.endswith("bias"):
            weights[name] = mx.array(random.standard_normal(array.shape), dtype=mx.float32).astype(
                dtype
            )
    module.load_weights(list(weights.items()))
    return module


def dense(quantized, group_size=GROUP):
    """The dequantized weight in float64."""
    return to_float64(
        mx.dequantize(
            quantized.weight,
            quantized.scales.astype(mx.float32),
            quantized.biases.astype(mx.float32),
            group_size,
            4,
        )
    )


def parameters_of(module, prefix=""):
    return [np.array(module[f"{prefix}{leaf}"]) for leaf in ("theta", "pairs", "channel_scales")]


def make_linear(inputs=192, outputs=96, **options):
    return fill(RotateQuantizedLinear(inputs, outputs, group_size=GROUP, krot=KROT, **options))


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


def test_nothing_takes_a_rotated_layer_for_a_plain_quantized_one():
    """`nn.quantize` asks for to_quantized; mlx-vlm multiplies by a QuantizedLinear's weight."""
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


def test_a_rotation_alone_gives_the_definition():
    layer = fill(Rotation(192, group_size=GROUP, krot=KROT))
    x = make_x((5, 192))
    expected = rotate_float64(to_float64(x), *parameters_of(layer), GROUP)
    assert error(layer(x), expected) < 1e-6


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 192), (2, 40, 192)])
def test_a_linear_equals_its_weight_with_the_rotation_folded_back(shape, has_bias):
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
    assert (rotation.table_bytes(model), rotation.table_seconds(model)) == (0, 0)
    mx.eval(model(make_x((1, 192), mx.float16)))
    assert names_and_shapes(model) == before
    assert names_and_shapes(model.layers[0]).keys() == {
        *("theta", "pairs", "channel_scales", "weight", "scales", "biases")
    }
    assert rotation.table_bytes(model) == 2 * 192 * (KROT * 10 + 4)
    assert rotation.table_seconds(model) > 0


@pytest.mark.usefixtures("on_the_cpu")  # counts the bytes of the reference's tables
def test_tables_can_be_built_before_the_first_call():
    model = nn.Sequential(make_linear(192, 192), make_linear(192, 64))
    rotation.build_tables(model)
    built = rotation.table_bytes(model), rotation.table_seconds(model)
    assert built[0] == 2 * 192 * (KROT * 10 + 4)
    mx.eval(model(make_x((1, 192), mx.float16)))
    assert built == (rotation.table_bytes(model), rotation.table_seconds(model))


@pytest.mark.usefixtures("on_the_cpu")  # counts the bytes of the reference's tables
def test_a_layer_that_two_places_share_counts_once():
    layer = make_linear(192, 192)
    model = nn.Sequential(layer, layer)
    rotation.build_tables(model)
    assert rotation.table_bytes(model) == 192 * (KROT * 10 + 4)


@pytest.mark.parametrize("name", ["theta", "pairs", "channel_scales"])
def test_tables_are_made_anew_when_a_parameter_is_replaced(name):
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


def test_threads_that_make_the_first_call_together_get_the_same_result():
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


def test_tables_made_in_a_thread_outlive_it():
    """MLX ties lazy arrays to their thread; tables are complete."""
    layer, x = make_linear(), make_x((4, 192), mx.float16)
    mx.eval(layer.parameters())
    thread = threading.Thread(target=rotation.build_tables, args=(layer,))
    thread.start()
    thread.join()
    assert rotation.table_bytes(layer) > 0
    assert mx.array_equal(layer(x), make_linear()(x))


class Relu(nn.Module):
    """An activation that is not the default one."""

    def __call__(self, x, gate):
        return nn.relu(gate) * x


@pytest.fixture(params=["mlx_lm", "mlx_vlm"])
def switch_layers(request):
    pytest.importorskip(request.param)
    return importlib.import_module(f"{request.param}.models.switch_layers")


def make_experts(switch_layers, **options):
    glu = switch_layers.SwitchGLU(128, 192, 6, **options)
    return fill(RotateSwitchGLU.from_switch_glu(glu, GROUP, KROT, 4)).eval()


def experts_float64(module, x, indices, activate):
    """Every token through each of its experts, one by one."""
    gate, up, down = (dense(module[name]) for name in ("gate_proj", "up_proj", "down_proj"))
    bias = {
        name: to_float64(module[name].bias) if "bias" in module[name] else np.zeros(6)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    rotated = rotate_float64(to_float64(x), *parameters_of(module, "gate_up_rot_"), GROUP)
    out = np.zeros((*indices.shape, 128))
    for place in np.ndindex(*indices.shape):
        e, row = indices[place].item(), rotated[place[:-1]]
        hidden = activate(gate[e] @ row + bias["gate_proj"][e])
        hidden = hidden * (up[e] @ row + bias["up_proj"][e])
        hidden = rotate_float64(hidden, *parameters_of(module, "down_rot_"), GROUP)
        out[place] = down[e] @ hidden + bias["down_proj"][e]
    return out


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 17)], ids=["decode", "few", "sorted"])
def test_experts_equal_each_expert_in_float64(switch_layers, shape):
    module, x = make_experts(switch_layers), make_x((*shape, 128))
    indices = mx.array(np.random.default_rng(2).integers(0, 6, (*shape, 2)))
    y = module(x, indices)
    assert y.shape == (*shape, 2, 128)
    assert error(y, experts_float64(module, x, indices, silu)) < 2e-6


def test_experts_keep_biases_and_the_models_activation(switch_layers):
    module = make_experts(switch_layers, activation=Relu(), bias=True)
    x, indices = make_x((3, 128)), mx.array([[0, 1], [5, 5], [3, 2]])
    expected = experts_float64(module, x, indices, lambda gate: np.maximum(gate, 0))
    assert error(module(x, indices), expected) < 2e-6


def test_experts_have_exactly_the_stored_parameters(switch_layers):
    glu = switch_layers.SwitchGLU(128, 192, 6)
    module = RotateSwitchGLU.from_switch_glu(glu, group_size=64, krot=3, bits=4)
    rotations = {
        f"{prefix}_rot_{leaf}": shape
        for prefix, dims in (("gate_up", 128), ("down", 192))
        for leaf, shape in (
            ("theta", (3, dims // 2)),
            ("pairs", (3, dims)),
            ("channel_scales", (1, dims)),
        )
    }
    projections = {
        f"{name}_proj.{leaf}": (6, outputs, width)
        for name, outputs, inputs in (("gate", 192, 128), ("up", 192, 128), ("down", 128, 192))
        for leaf, width in (("weight", inputs // 8), ("scales", inputs // 64))
    }
    projections |= {
        name.replace("scales", "biases"): shape
        for name, shape in projections.items()
        if "scales" in name
    }
    assert names_and_shapes(module) == rotations | projections
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert type(module[name]) is switch_layers.QuantizedSwitchLinear
        assert module[name].input_dims == glu[name].input_dims
    assert not hasattr(module, "to_quantized")


def test_many_experts_are_made_without_their_weights(switch_layers):
    glu = switch_layers.SwitchGLU(2048, 768, 256)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    RotateSwitchGLU.from_switch_glu(glu, 128, 8, 4)
    assert mx.get_peak_memory() - before < 1 << 20


def test_expert_inputs_that_do_not_divide_into_groups_are_refused(switch_layers):
    with pytest.raises(ValueError, match="192 channels do not divide into groups of 128"):
        RotateSwitchGLU.from_switch_glu(switch_layers.SwitchGLU(128, 192, 2), 128, 8, 4)


@pytest.mark.usefixtures("on_the_cpu")  # counts the bytes of the reference's tables
def test_experts_report_both_tables_and_follow_new_parameters(switch_layers):
    module = make_experts(switch_layers)
    x, indices = make_x((3, 128)), mx.array([[0, 1], [5, 5], [3, 2]])
    rotation.build_tables(module)
    assert rotation.table_bytes(module) == (128 + 192) * (KROT * 10 + 4)
    fill(module, seed=1)
    expected = experts_float64(module, x, indices, silu)
    assert error(module(x, indices), expected) < 2e-6


def test_experts_do_not_offer_their_parts_to_code_that_would_skip_the_rotation(switch_layers):
    """mlx-vlm's verifier takes a module with three projections and `activation` apart."""
    assert not hasattr(make_experts(switch_layers), "activation")


def test_importing_the_layers_imports_no_model_library():
    """A dense text model must not pay for mlx-vlm, nor a run without models for mlx-lm."""
    code = (
        "import sys, paroquant_stream.rotation.layers;"
        "sys.exit(bool({'mlx_lm', 'mlx_vlm', 'paroquant'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
