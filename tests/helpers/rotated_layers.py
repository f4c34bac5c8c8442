"""Rotated layers with random parameters, and their weights in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from paroquant_stream.rotation.layers import RotatedLayer, RotateQuantizedLinear
from tests.helpers.rotations import make_rotation, to_float64

GROUP, KROT = 64, 4


class Rotation(RotatedLayer):
    """A layer that only rotates x: from (..., dims) to (..., dims) in the same dtype."""

    def __init__(self, dims: int, *, group_size: int = 128, krot: int = 8) -> None:
        super().__init__(group_size)
        self._add_rotation("", dims, krot)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate x."""
        return self._rotate(x)


def names_and_shapes(module):
    """Map the name of each parameter to its shape."""
    return {name: tuple(array.shape) for name, array in tree_flatten(module.parameters())}


def fill(module, seed=0, dtype=mx.float16):
    """Set every parameter of a module to random rotations and quantized weights."""
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
    """Dequantize a layer's weight to float64."""
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
    """List the parameters of a rotation as numpy arrays."""
    return [np.array(module[f"{prefix}{leaf}"]) for leaf in ("theta", "pairs", "channel_scales")]


def make_linear(inputs=192, outputs=96, **options):
    """Make a rotated linear layer with random parameters."""
    return fill(RotateQuantizedLinear(inputs, outputs, group_size=GROUP, krot=KROT, **options))
