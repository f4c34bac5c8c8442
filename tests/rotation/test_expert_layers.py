"""The rotated experts: their parameters, and their output against float64."""

from __future__ import annotations

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from paroquant_stream.rotation.layers import RotateSwitchGLU, build_tables, table_bytes
from tests.helpers.rotated_layers import (
    GROUP,
    KROT,
    dense,
    fill,
    names_and_shapes,
    parameters_of,
)
from tests.helpers.rotations import error, make_x, rotate_float64, to_float64


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
    """Compute every token through each of its experts, one by one."""
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
    glu = switch_layers.SwitchGLU(1024, 128, 64)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    module = RotateSwitchGLU.from_switch_glu(glu, 128, 8, 4)
    assert mx.get_peak_memory() - before < 1 << 20
    assert not any(mx.any(array) for array in module.gate_proj.parameters().values())


def test_inputs_that_do_not_divide_into_groups_are_refused(switch_layers):
    with pytest.raises(ValueError, match="192 channels do not divide into groups of 128"):
        RotateSwitchGLU.from_switch_glu(switch_layers.SwitchGLU(128, 192, 2), 128, 8, 4)


@pytest.mark.usefixtures("on_the_cpu")  # counts the bytes of the reference's tables
def test_experts_report_both_tables_and_follow_new_parameters(switch_layers):
    module = make_experts(switch_layers)
    x, indices = make_x((3, 128)), mx.array([[0, 1], [5, 5], [3, 2]])
    build_tables(module)
    assert table_bytes(module) == (128 + 192) * (KROT * 10 + 4)
    fill(module, seed=1)
    expected = experts_float64(module, x, indices, silu)
    assert error(module(x, indices), expected) < 2e-6


def test_experts_have_no_attribute_that_mlx_vlm_takes_apart(switch_layers):
    """mlx-vlm calls the projections of a module with `activation` directly, without rotations."""
    assert not hasattr(make_experts(switch_layers), "activation")


@pytest.mark.parametrize(("rows", "in_order"), [(31, False), (32, True)])
def test_rows_are_sorted_by_expert_from_64_routed_ones_on(switch_layers, rows, in_order):
    module, asked = make_experts(switch_layers), []

    class Recorder(nn.Module):
        def __call__(self, x, chosen, sorted_indices):
            asked.append(sorted_indices)
            return up(x, chosen, sorted_indices=sorted_indices)

    up = module.up_proj
    module.up_proj = Recorder()
    module(make_x((rows, 128)), mx.zeros((rows, 2), mx.uint32))
    assert asked == [in_order]


def test_no_rotation_is_trainable(switch_layers):
    trainable = make_experts(switch_layers).trainable_parameters()
    assert not [name for name in trainable if "_rot_" in name]
