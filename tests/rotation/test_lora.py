"""A LoRA adapter on a rotated layer."""

from __future__ import annotations

import mlx.core as mx
import pytest

from paroquant_stream.rotation.layers import RotateQuantizedLinear

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_a_new_adapter_changes_nothing():
    layer = RotateQuantizedLinear(128, 64, group_size=32, krot=2)
    layer.weight = mx.random.randint(0, 2**31, layer.weight.shape).astype(mx.uint32)
    layer.scales = mx.random.normal(layer.scales.shape)
    x = mx.random.normal((3, 128))
    adapted = layer.to_lora(r=4)
    assert mx.array_equal(adapted(x), layer(x))
    assert adapted.lora_a.shape == (128, 4)
    assert adapted.lora_b.shape == (4, 64)


def test_the_adapter_sees_the_input_before_the_rotation():
    layer = RotateQuantizedLinear(128, 64, group_size=32, krot=2)
    layer.channel_scales = mx.full((1, 128), 3.0)
    adapted = layer.to_lora(r=4, scale=0.5)
    adapted.lora_b = mx.random.normal((4, 64))
    x = mx.random.normal((3, 128)).astype(mx.float16)
    change = 0.5 * ((x @ adapted.lora_a) @ adapted.lora_b)
    assert mx.allclose(adapted(x), change.astype(mx.float16) + layer(x))
